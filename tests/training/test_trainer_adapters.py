"""PEFT students: checkpoints, resuming, the best model, export."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import ElectraConfig, ElectraForSequenceClassification

from fakit import shrink
from fakit.models.load import is_quantized
from tests.families import batch
from tests.training.runs import data, logged, make, parts

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"]}


def adapted(family: str = "gpt2", width: int | None = 16, rank: int = 4, seed: int = 5, **settings):
    teacher, student, objective = parts(family, width)
    torch.manual_seed(seed)
    settings = {
        "r": rank,
        "target_modules": TARGETS[family],
        "init_lora_weights": False,
        "lora_dropout": 0.1,
    } | settings
    return teacher, peft.get_peft_model(student, peft.LoraConfig(**settings)), objective


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def saving(folder: Path, made, **settings):
    return make(folder, "gpt2" if "GPT2" in type(made[0]).__name__ else "bert", made=made, max_steps=6, **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"modules_to_save": ["ln_f"]}),  # narrower than its teacher: with projections
        ("bert", {"task_type": "SEQ_CLS"}),  # its classifier is trained and saved, too
        ("bert", {"width": None, "use_dora": True}),
    ],
    ids=["gpt2", "bert", "dora"],
)
def test_resume_continues_exactly(family, settings, tmp_path):
    straight = saving(tmp_path / "a", adapted(family, **settings), save_strategy="steps", save_steps=3)
    start = trained(straight)
    straight.train()
    resumed = saving(tmp_path / "b", adapted(family, **settings), save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert logged(resumed)[-3:] == logged(straight)[-3:]
    for name, value in trained(straight).items():
        assert torch.equal(trained(resumed)[name], value), name
        assert not torch.equal(start[name], value), name
    assert any("lora" in name for name in start)
    assert ("width" not in settings) == any("projections" in name for name in start)


def test_the_best_checkpoint_comes_back_and_old_ones_go(tmp_path):
    trainer = saving(
        tmp_path,
        adapted("bert", task_type="SEQ_CLS"),
        evaluated=data(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=0.3,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert best in {int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")}


def test_the_export_is_the_adapter_as_peft_writes_it(tmp_path):
    made = adapted("bert", task_type="SEQ_CLS")
    trainer = saving(tmp_path, made)
    trainer.train()
    trainer.save_model(str(tmp_path / "export"))
    assert not list((tmp_path / "export").glob("projections*"))
    back = peft.PeftModel.from_pretrained(parts("bert")[1], tmp_path / "export").eval()
    with torch.no_grad():
        assert torch.equal(back(**batch(3)).logits, made[1].eval()(**batch(3)).logits)


def test_what_cannot_be_resumed_is_refused_by_name(tmp_path):
    saving(tmp_path, adapted(), save_strategy="steps", save_steps=3).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other = adapted()
    with torch.no_grad():
        other[1].get_base_model().transformer.wte.weight.add_(1)
    with pytest.raises(ValueError, match="student's base"):
        saving(tmp_path / "b", other, save_strategy="steps", save_steps=3).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"holds another adapter .* saved \(4, 16\), the student's \(2, 16\)"):
        saving(tmp_path / "c", adapted(rank=2))._load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"adapter_config\.json, .* missing"):
        saving(tmp_path / "d", adapted())._load_from_checkpoint(str(tmp_path))


def test_parameters_outside_of_the_adapter_are_refused_before_they_are_lost(tmp_path):
    made = adapted()
    made[1].get_base_model().transformer.ln_f.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains 2 parameters outside of its adapter \(.*ln_f.*modules_to_save"):
        saving(tmp_path, made)


def test_an_8bit_base_under_an_adapter_trains_and_resumes(tmp_path):
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=99,
        hidden_size=16,
        embedding_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=3,
    )
    teacher = ElectraForSequenceClassification(config).eval()
    shrink(teacher, 2).save_pretrained(tmp_path / "base")

    def made():
        base = ElectraForSequenceClassification.from_pretrained(
            tmp_path / "base",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"]),
        )
        assert is_quantized(base)
        torch.manual_seed(1)
        settings = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        _, _, objective = parts("bert", None)
        return teacher, peft.get_peft_model(base, settings), objective

    straight = saving(tmp_path / "a", made(), save_strategy="steps", save_steps=3)
    straight.train()
    resumed = saving(tmp_path / "b", made(), save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert logged(resumed)[-3:] == pytest.approx(logged(straight)[-3:], rel=1e-5)
