"""Plans: recorded models have their real sizes, fitting and largest batch are true,
what cannot be planned is refused, the command.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForMaskedLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MBartConfig,
    Mistral3Config,
    MixtralConfig,
    SiglipVisionConfig,
    T5Config,
    XLNetConfig,
)

from fakit import LayerMap
from fakit.__main__ import main
from fakit.models.pretrained import CLASSES
from fakit.planner import CARDS, PRESETS, Plan, find_card, plan, planning, presets, read_config
from fakit.planner.planning import CONTEXT, FRAGMENTS
from fakit.planner.presets import config_text, guess_task
from fakit.planner.step import position_limit, simulate

# As the models' pages on the hub count them; an encoder with its masked-language head.
PARAMETERS = {
    "bert-base-uncased": 109_514_298,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}


@pytest.fixture(scope="module")
def small():
    """GPT-2 on two gigabytes: a plan whose batch of 8 does not fit."""
    return plan("gpt2", "2x256", 64, 256, memory="3GB")


@pytest.mark.parametrize("name", PARAMETERS)
def test_recorded_models_have_the_sizes_they_are_known_by(name):
    found = plan(name, (1, None), 1, 8, terms=("outputs",))
    assert found.step.parameters["teacher"] == PARAMETERS[name]
    assert found.teacher.endswith(name)


def test_teachers_reach_from_a_tenth_to_seventy_billion_parameters():
    assert len(PRESETS) >= 15
    seventy = plan("meta-llama/Llama-3.1-70B", "4x1024", 1, 128, quantize="4bit", memory="A100 80GB")
    assert 35e9 < seventy.memory["teacher weights"] < 45e9 and seventy.fits
    assert not plan("meta-llama/Llama-3.1-70B", "4x1024", 1, 128, memory="A100 80GB").fits


def test_a_plan_is_the_sum_of_its_parts(small):
    moving = {
        k: v
        for k, v in small.memory.items()
        if k not in ("teacher weights", "student weights", "optimizer state", "overhead")
    }
    assert small.memory["overhead"] == pytest.approx(CONTEXT + FRAGMENTS * sum(moving.values()))
    assert small.peak == pytest.approx(sum(small.memory.values()))
    assert sum(small.step.flops.values()) == small.flops
    assert "overhead" not in plan("gpt2", "2x256", 2, 32, device="cpu").memory


def test_the_largest_batch_fits_and_the_next_does_not(small):
    assert not small.fits and 0 < small.largest_batch < small.setup.batch
    assert small.with_setup(batch=small.largest_batch).fits
    assert not small.with_setup(batch=small.largest_batch + 1).fits


def test_changes_save_memory_and_say_whether_they_suffice(small):
    changes = dict(small.changes)
    assert {"gradient checkpointing", f"batch {small.largest_batch}", "8-bit teacher", "4-bit teacher"} <= set(changes)
    assert all(found.peak < small.peak for found in changes.values())
    advice = " ".join(small.advice())
    assert f"Batch {small.largest_batch}:" in advice and "fits" in advice
    assert plan("Llama-3.1-70B", "4x1024", 1, 64, memory="12GB").largest_batch == 0


def test_longer_rows_and_more_rows_take_more():
    shapes = [(1, 64), (2, 64), (2, 128), (8, 128)]
    peaks = [plan("gpt2", "2x256", *shape, memory="T4").peak for shape in shapes]
    assert peaks == sorted(peaks) and len(set(peaks)) == 4


def test_time_follows_from_flops_bandwidth_and_card(small):
    fast, slow = (small.seconds(name) for name in ("H100", "T4"))
    assert fast < slow
    half = small.flops / CARDS["T4"].half / small.utilization
    assert slow >= half  # no step is faster than its products
    with pytest.raises(ValueError, match=r"names none; cards: .*T4"):
        small.seconds()
    assert plan("gpt2", "2x256", 4, 128, memory="T4", tokens=512_000).steps == 1000


def test_the_same_question_is_answered_once():
    plan("gpt2", 2, 2, 32)
    before = simulate.cache_info().hits
    plan("gpt2", 2, 2, 32, memory="A100 80GB")
    assert simulate.cache_info().hits == before + 1


def test_a_folder_and_a_hub_model_on_this_machine(tmp_path):
    BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    found = plan(tmp_path, 1, 2, 16)
    assert found.setup.task == "sequence-classification" and found.step.depths == {"teacher": 2, "student": 1}
    packaged = plan("sentence-transformers/all-MiniLM-L6-v2", 3, 2, 16)
    assert packaged.step.depths["teacher"] == 6 and packaged.step.widths["teacher"] == 384


def test_a_layer_map_and_blocks_by_number():
    one = plan("gpt2", [1, 12], 32, 128, layer_map=LayerMap([(2, 12)]), terms=("features",))
    all_of_them = plan("gpt2", [1, 12], 32, 128, terms=("features",))
    assert one.setup.layers == (1, 12) and one.step.depths["student"] == 2
    assert one.memory["captured traces"] < all_of_them.memory["captured traces"]


def test_it_draws_and_prints_itself(small):
    bundle = small._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
    text = bundle["text/plain"]
    assert "times are assumptions" in text and "Does not fit" in text and "openai-community/gpt2" in text
    figure = small.figure()
    assert [trace.name for trace in figure.plotly.data] == [part for part in small.memory]
    assert list(figure.plotly.data[0].y)[-1] == "as asked"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("16GB", (16e9, None)),
        ("0.5 gb", (5e8, None)),
        ("8GiB", (2**33, None)),
        (1e9, (1e9, None)),
        ("t4", (16e9, "T4")),
        ("a100-40gb", (40e9, "A100 40GB")),
    ],
)
def test_memory_is_an_amount_or_a_card(asked, found):
    _, size, card = find_card(asked)
    assert (size, card and card.name) == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(teacher="no/such-model"), r"no/such-model.*recorded models: .*Llama-3\.1-8B"),
        (dict(student="4 by 256"), r"LAYERS\[xWIDTH\]"),
        (dict(student=40), "a student of 40 layers asked of a teacher of 12"),
        (dict(student="4x4000"), "hidden_size 4000 asked of a teacher of width 768"),
        (dict(quantize="2bit"), "quantize is '2bit'; choose one of None, 8bit, 4bit"),
        (dict(optimizer="lion"), "optimizer is 'lion'"),
        (dict(terms=("features", "hints")), "'hints'; choose one of features"),
        (dict(batch=0), "batch is 0"),
        (dict(batch=8.5), "batch is 8.5; it is a whole number above 0"),
        (dict(batch="8"), "batch is '8'; it is a whole number above 0"),
        (dict(seq=float("nan")), "seq is nan; it is a whole number above 0"),
        (dict(seq=True), "seq is True; it is a whole number above 0"),
        (dict(student=(4, "256")), "student width is '256'; it is a whole number above 0"),
        (dict(student=(4.5, None)), "student layers is 4.5; it is a whole number above 0"),
        (dict(tokens=0), "tokens is 0; it is above 0"),
        (dict(tokens=float("inf")), "tokens is inf; it is above 0 and finite"),
        (dict(task="translation"), "task is 'translation'; choose one of None, causal-lm, masked-lm, sequence-"),
        (dict(seq=4096), "4096 tokens a row, and .*gpt2 has 1024 positions"),
        (dict(memory="plenty"), "'plenty' is neither an amount .* known: .*T4"),
        (dict(utilization=40), "utilization is 40"),
        (dict(terms=()), "needs at least one of"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        plan(**{"teacher": "gpt2", "student": 4, "batch": 2, "seq": 32} | asked)


def test_a_whole_number_is_one_however_it_is_written():
    asked, as_float = plan("gpt2", (2, 256), 2, 32), plan("gpt2", (np.int32(2), 256.0), 2.0, np.int64(32))
    assert as_float.setup == asked.setup and type(as_float.setup.batch) is type(as_float.setup.seq) is int


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
TABLES = {  # of 20 positions, as the configuration counts them → the longest row
    "bert": (TINY, 20),
    "electra": (TINY | {"embedding_size": 16}, 20),
    "roberta": (TINY, 18),
    "xlm-roberta": (TINY, 18),
    "camembert": (TINY | {"pad_token_id": 3}, 16),
    "mpnet": (TINY, 18),
    "data2vec-text": (TINY, 18),
    "longformer": (TINY | {"attention_window": 4}, 18),
    "esm": (TINY | {"pad_token_id": 1, "mask_token_id": 4}, 18),
    "distilbert": ({"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 50}, 20),
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}, 20),
    "opt": (TINY | {"ffn_dim": 16, "word_embed_proj_dim": 16}, 20),
    "bart": ({"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}, 20),
}


@pytest.mark.parametrize("family", TABLES)
def test_the_longest_row_is_the_one_that_the_model_runs(family):
    values, longest = TABLES[family]
    config = AutoConfig.for_model(family, **values, max_position_embeddings=20)
    assert position_limit(config_text(config), "encoder") == longest
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids = torch.full((1, longest + 1), 7)
    with torch.no_grad():
        model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("seq", [513, 514])
def test_roberta_has_512_positions_of_its_514(seq):
    assert plan("roberta-base", 2, 1, 512).setup.seq == 512
    with pytest.raises(ValueError, match=rf"{seq} tokens a row, and FacebookAI/roberta-base has 512 positions"):
        plan("roberta-base", 2, 1, seq)


def test_turned_positions_have_no_table_and_no_limit():
    config = LlamaConfig(**TINY, max_position_embeddings=20)
    assert position_limit(config_text(config), "causal-lm") is None
    assert plan(config, 1, 1, 64).setup.seq == 64


def test_a_family_that_makes_tensors_of_its_own_is_refused():
    config = XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=48, vocab_size=100)
    with pytest.raises(ValueError, match="a step of XLNet cannot be run without data"):
        plan(config, 1, 2, 16, task="causal-lm")


def test_the_task_is_the_one_that_was_saved_or_that_the_family_is_known_for():
    assert guess_task(read_config("gpt2")[1]) == "causal-lm"
    assert guess_task(read_config("bert-base-uncased")[1]) == "masked-lm"
    assert guess_task(LlamaConfig(architectures=["LlamaForSequenceClassification"])) == "sequence-classification"


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_prints_and_its_exit_says_whether_it_fits(capsys, tmp_path):
    asked = ["plan", "--teacher", "gpt2", "--student", "2x256", "--batch", "4", "--seq", "64", "--quantize", "8bit"]
    picture = tmp_path / "plan.svg"
    assert main([*asked, "--memory", "T4", "--figure", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "Fits:" in said and "8bit" in said and "T4:" in said and picture.read_text().startswith("<svg")
    assert main([*asked, "--memory", "1GB"]) == 1
    assert "Does not fit" in capsys.readouterr().out


def test_command_refuses_in_one_line(capsys):
    assert main(["plan", "--teacher", "gpt2", "--student", "99"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fakit: ") and "12" in said and "Traceback" not in said
    assert main(["plan", "--teacher", "gpt2", "--student", "4", "--task", "translation"]) == 2
    assert f"choose one of None, {', '.join(CLASSES)}." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = "".join(capsys.readouterr().out.split())  # lines may end at a hyphen
    assert all(task in said for task in CLASSES)


def test_a_plan_needs_no_weights(tmp_path):
    """A folder with a configuration alone."""
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = plan(tmp_path, "2x32", 2, 16)
    assert isinstance(found, Plan) and found.step.widths == {"teacher": 64, "student": 32}


@pytest.mark.parametrize(
    ("kind", "vocabulary", "parameters"),
    [("t5", 32_128, 247_577_856), ("mt5", 250_112, 582_401_280)],  # flan-t5-base and t5-v1_1-base; mt5-base
)
def test_heads_of_their_own_are_counted_though_the_configuration_class_ties_them(
    kind, vocabulary, parameters, tmp_path
):
    sizes = {"d_model": 768, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
    settings = sizes | {"model_type": kind, "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu"}
    settings |= {"tie_word_embeddings": False, "is_encoder_decoder": True, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert plan(tmp_path, 2, batch=1, seq=8, task="seq2seq-lm").step.parameters["teacher"] == parameters


@pytest.mark.parametrize("kind", ["mamba2", "fnet"])
def test_models_without_heads_are_planned_without_attention_and_refused_with_it_for_that_reason(kind):
    config, model = {
        "mamba2": (
            Mamba2Config(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_heads=4, head_dim=8, n_groups=1),
            Mamba2ForCausalLM,
        ),
        "fnet": (FNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3), FNetForMaskedLM),
    }[kind]
    found = plan(config, 2, batch=1, seq=8, terms=("features", "outputs", "task"))
    assert found.step.parameters["teacher"] == sum(p.numel() for p in model(config).parameters())
    with pytest.raises(ValueError, match=r"gives no attention maps.*Leave the attention term out"):
        plan(config, 2, batch=1, seq=8)


# -- what kind of model it is -----------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 8, "patch_size": 4}


def test_a_decoder_that_sees_is_planned_as_the_causal_model_it_is():
    text = Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=16)
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**EYE).to_dict())
    assert guess_task(config) == "causal-lm"
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert guess_task(config) == "causal-lm"
    found = plan(config, 2, 2, 16, device="cpu")  # four patches of an image are no limit of a text's length
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert found.step.parameters["teacher"] == sum(p.numel() for p in model.parameters())


def test_conditional_generation_is_an_encoder_decoders_where_it_is_one():
    names = {"architectures": ["MBartForConditionalGeneration"]}
    assert guess_task(MBartConfig(**names)) == "seq2seq-lm"
    assert guess_task(Mistral3Config(architectures=["Mistral3ForConditionalGeneration"])) == "causal-lm"
    assert guess_task(T5Config(architectures=["T5WithLMHeadModel"])) == "seq2seq-lm"


def test_what_no_class_is_made_of_is_refused_in_one_sentence():
    with pytest.raises(
        ValueError, match=r"makes no causal-lm model \(AutoModelForCausalLM\) of a LlavaConfig \(llava\)"
    ):
        plan(LlavaConfig(architectures=["LlavaForConditionalGeneration"]), 2, 2, 16)


def test_a_setting_that_is_missing_is_not_said_to_be_a_question_of_data():
    config = T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=r"a step of T5 as a seq2seq-lm model does not run: .*decoder_start_token_id"):
        plan(config, 1, 2, 16)


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_is_the_devices_and_is_stated(monkeypatch, fast):
    asked = []
    monkeypatch.setattr(planning, "bf16_is_fast", lambda device: asked.append(device.type) or fast)
    gpu, cpu = (plan("gpt2", "1x64", 1, 8, terms=("features",), device=device) for device in ("gpu", "cpu"))
    assert asked == ["cpu"]
    assert gpu.setup.dtype == "bf16" and "dtype    bf16 autocast, assumed for a GPU\n" in str(gpu)
    name = "bf16 autocast" if fast else "float32"
    assert cpu.setup.dtype == ("bf16" if fast else "fp32")
    assert f"dtype    {name}, assumed for this processor, which computes it faster\n" in str(cpu)
    other = "fp32" if fast else "bf16"
    given = plan("gpt2", "1x64", 1, 8, terms=("features",), device="cpu", dtype=other)
    assert given.setup.dtype == other and given.precision == ("float32" if fast else "bf16 autocast")
    assert cpu.with_setup(batch=2).assumed_dtype and not cpu.with_setup(dtype=other).assumed_dtype


def test_few_bits_of_a_mixture_say_what_they_leave():
    config = MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    full, few = (plan(config, 2, 2, 16, dtype="bf16", device="cpu", quantize=bits) for bits in (None, "4bit"))
    experts = 4 * 4 * 3 * 64 * 128  # layers × experts × projections × d × d_ff
    assert few.step.stacked == experts
    assert few.step.weight_bytes["teacher"] > 2 * experts > 0.8 * full.step.weight_bytes["teacher"]
    assert (
        f"{experts / full.step.parameters['teacher']:.0%} of the teacher's parameters are experts"
        in few._unquantized()[0]
    )
    assert not full._unquantized()
    dense = plan(LlamaConfig(**TEXT), 2, 2, 16, device="cpu", quantize="4bit")
    assert dense.step.stacked == 0 and not dense._unquantized()


@pytest.mark.parametrize(("stored", "other"), [("8bit", "4bit"), ("4bit", "8bit")])
def test_a_checkpoint_that_is_quantized_already_is_planned_as_it_is_stored(stored, other):
    own = {"quant_method": "bitsandbytes", f"load_in_{stored}": True}
    config, plain = LlamaConfig(**TEXT, quantization_config=own), LlamaConfig(**TEXT)
    found = plan(config, 2, 2, 16)
    assert found.setup.quantize == stored
    assert found.step.weight_bytes == plan(plain, 2, 2, 16, quantize=stored).step.weight_bytes
    assert not any("bit teacher" in name for name, _ in planning._changes(found.setup, 2))
    with pytest.raises(ValueError, match=f"quantize='{other}' was requested, .* is stored in '{stored}' already"):
        plan(config, 2, 2, 16, quantize=other)


def test_a_checkpoint_that_is_stored_in_another_way_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"is stored in 'gptq' \(its quantization_config\)"):
        plan(LlamaConfig(**TEXT, quantization_config={"quant_method": "gptq", "bits": 4}), 2, 2, 16)


def test_instruct_variants_have_the_shapes_of_their_base():
    for variant, base in presets.VARIANTS.items():
        name, config = presets.read_config(variant.split("/")[1].lower())
        assert name == variant and base in presets.PRESETS
        assert presets.config_text(config) == presets.config_text(presets.read_config(base)[1])


def test_a_recorded_model_may_be_the_student():
    made = plan("Qwen3-4B", "Qwen3-0.6B", 2, 64)
    assert made.step.depths == {"teacher": 36, "student": 28} and made.step.widths["student"] == 1024
    assert made.name == "Qwen3-0.6B, batch 2 × 64" and "Qwen/Qwen3-4B → Qwen3-0.6B" in repr(made)


def test_heads_that_no_mean_brings_together_are_refused_as_in_training():
    with pytest.raises(ValueError, match=r"12 divides not both 12 \(student\) and 16 \(teacher\)"):
        plan("gpt2-medium", "gpt2", 2, 64)


@pytest.mark.parametrize(
    ("teacher", "student", "seq", "said"),
    [
        ("gpt2", "Qwen3-0.6B", 64, r"student Qwen/Qwen3-0\.6B has 151,936 entries, .*gpt2 50,257"),
        ("gpt2-medium", "gpt2", 1025, "1025 tokens a row"),
        ("gpt2", "4by", 64, r"'4by' is no LAYERS\[xWIDTH\].*Another model is given by a recorded name"),
        ("gpt2", "./nothing/here", 64, "no directory at"),
    ],
)
def test_students_that_cannot_be(teacher, student, seq, said):
    with pytest.raises(ValueError, match=said):
        plan(teacher, student, 1, seq)
