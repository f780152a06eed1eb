"""Training students of every kind: without heads, with layerdrop, of two stacks."""

import pytest
import torch
import transformers as hf

from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, capture, shrink
from fakit.models import stack_depths, without_layerdrop
from fakit.models.kinds import layerdrop
from tests.families import EVERY, SIZES, batch_for, tiny
from tests.training.runs import arguments, logged

ROWS = [{"input_ids": [3, 4, 5, 6], "attention_mask": [1, 1, 1, 1], "labels": [3, 4, 5, 6]}] * 4
_SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4}
WITHOUT_HEADS = {
    "mamba2": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**_SMALL, num_heads=4, head_dim=8, n_groups=1)),
    "fnet": lambda: hf.FNetForMaskedLM(hf.FNetConfig(**_SMALL, pad_token_id=0)),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**_SMALL)),
}


@pytest.mark.parametrize("kind", WITHOUT_HEADS)
def test_models_without_heads_train_on_features_and_outputs(kind, tmp_path):
    torch.manual_seed(0)
    teacher = WITHOUT_HEADS[kind]().eval()
    student, layer_map = shrink(teacher, layers=2), LayerMap.uniform(2, 4)
    before = {name: p.clone() for name, p in student.named_parameters()}
    terms = {"features": Features("mse"), "outputs": Outputs("forward_kl"), "task": Task()}
    trainer = DistillationTrainer(
        teacher, student, Objective(layer_map, **terms), arguments(tmp_path), train_dataset=ROWS
    )
    trainer.train()
    assert all(logged(trainer, name)[0] > 0 for name in terms)
    assert any(not torch.equal(p.cpu(), before[name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("kind", ["mamba2", "fnet"])
def test_an_attention_term_over_models_without_attention_is_refused_before_training(kind, tmp_path):
    teacher = WITHOUT_HEADS[kind]().eval()
    objective = Objective(LayerMap.uniform(2, 4), attention=Attention("kl"))
    with pytest.raises(ValueError, match=r"gives no attention maps.*attention=None"):
        DistillationTrainer(teacher, shrink(teacher, layers=2), objective, arguments(tmp_path), train_dataset=ROWS)


# -- layerdrop ---------------------------------------------------------------------------------------------------------

_BART = {k: v for k, v in EVERY["bart"][1]().to_dict().items() if k not in ("model_type", "architectures")}
_BOTH = {"encoder_layerdrop": 0.6, "decoder_layerdrop": 0.7}
WITH_LAYERDROP = {
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART | _BOTH)), _BOTH),
    "pegasus": (lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_BART | _BOTH)), _BOTH),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
                ffn_dim=48,
                word_embed_proj_dim=32,
                layerdrop=0.8,
            )
        ),
        {"layerdrop": 0.8},
    ),
    "xglm": (
        lambda: hf.XGLMForCausalLM(
            hf.XGLMConfig(
                vocab_size=50, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, layerdrop=0.8, pad_token_id=1
            )
        ),
        {"layerdrop": 0.8},
    ),
}


@pytest.mark.parametrize("kind", WITH_LAYERDROP)
def test_layerdrop_is_off_in_students_whose_layers_are_matched_and_said(kind, tmp_path, caplog):
    torch.manual_seed(0)
    make, settings = WITH_LAYERDROP[kind]
    teacher = make().eval()
    assert layerdrop(teacher) == settings
    depths = stack_depths(teacher)
    student = make()  # as a student of a path comes, and not by shrink
    inputs = {name: value for name, value in batch_for(teacher, padding=0).items() if name != "token_type_ids"}
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}=0.*without_layerdrop\(model\)"):
        capture(student.train(), inputs, [1, 2])
    rows = [{name: value[i] for name, value in inputs.items()} for i in (0, 1)] * 4
    objective = Objective(LayerMap.uniform(depths, depths), Features("mse"), task=Task())
    trainer = DistillationTrainer(
        teacher, student, objective, arguments(tmp_path, per_device_train_batch_size=2), train_dataset=rows
    )
    assert all(name in caplog.text for name in settings) and layerdrop(student) == {}
    trainer.train()
    assert len(logged(trainer, "features")) == 4  # 0.2 ** 12 of all steps would run every layer

    caplog.clear()
    assert layerdrop(shrink(teacher, layers=2)) == {} and all(name in caplog.text for name in settings)
    assert layerdrop(teacher) == settings  # which drops nothing in eval mode


def test_layerdrop_that_the_forward_pass_reads_from_its_configuration():
    config = hf.Wav2Vec2Config(
        **{
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "layerdrop": 1.0,
        },
        **{"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
    )
    model = hf.Wav2Vec2Model(config).train()
    sound = {"input_values": torch.randn(2, 60)}
    with pytest.raises(ValueError, match=r"layerdrop=1\.0 leaves out whole layers at random"):
        capture(model, sound, [1, 2, 3], logits=False)
    assert without_layerdrop(model) == {"layerdrop": 1.0}
    assert sorted(capture(model, sound, [1, 2, 3], logits=False).hidden_states) == [1, 2, 3]


# -- two stacks --------------------------------------------------------------------------------------------------------


def test_uniform_maps_of_unequal_stacks_pair_encoder_with_encoder(tmp_path):
    config = hf.BartConfig(**_BART | {"encoder_layers": 6, "decoder_layers": 2})
    teacher = hf.BartForConditionalGeneration(config).eval()
    student = shrink(teacher, layers=[1, 4, 7, 8])
    depths = [stack_depths(student), stack_depths(teacher)]
    assert depths == [[2, 2], [6, 2]]
    configured = LayerMap.named("uniform", *depths)
    assert configured.pairs == LayerMap.uniform(*depths).pairs == [(1, 3), (2, 6), (3, 7), (4, 8)]
    plain = LayerMap.uniform(4, 8)
    assert plain.pairs[2] == (3, 6)  # a decoder's layer on an encoder's
    objective = Objective(plain, Features("mse"))
    with pytest.raises(
        ValueError, match=r"pair \(3, 6\).*decoder with the teacher's encoder.*\[2, 2\], \[6, 2\]\) fits"
    ):
        DistillationTrainer(teacher, student, objective, arguments(tmp_path))
    inputs = batch_for(teacher, padding=0)
    inputs["labels"] = inputs["input_ids"]  # of equal length, the pair would go through
    with pytest.raises(ValueError, match="S3←T6 matches an encoder's layer with a decoder's"):
        objective(capture(student, inputs, [1, 2, 3, 4]), capture(teacher, inputs, range(9)))


def test_layer_maps_of_terms_are_looked_at_too(tmp_path):
    teacher = tiny("t5")
    objective = Objective(features=Features("mse", layer_map=LayerMap([(1, 4)])))
    with pytest.raises(ValueError, match="encoder with the teacher's decoder"):
        DistillationTrainer(teacher, shrink(teacher, layers=2), objective, arguments(tmp_path))
