"""A cache reads back what its teacher's configuration held: infinities, NaN, pairs, dtypes, nested configurations."""

import math

import pytest
import torch
import transformers as hf
from transformers import CONFIG_MAPPING

from fakit import DistillationTrainer, Features, LayerMap, Objective, Outputs, TeacherCache, shrink
from fakit.training.teacher_cache.fingerprints import config_facts, config_values
from fakit.training.teacher_cache.training import recorded_teacher
from tests.training.runs import arguments

CONFIGURATIONS = {
    "limits up to infinity": lambda: hf.BambaConfig(),
    "a not-a-number": lambda: hf.MixtralConfig(router_jitter_noise=math.nan),
    "minus infinity": lambda: hf.LlamaConfig(lowest=-math.inf, dtype=torch.bfloat16),
    "nested": lambda: hf.LlavaConfig(text_config=hf.MistralConfig(highest=[0.0, math.inf])),
    "labels": lambda: hf.BertConfig(id2label={0: "no", 1: "yes", 2: "maybe"}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_comes_back_as_it_was(name):
    config = CONFIGURATIONS[name]()
    values = config_values(config_facts(config))
    again = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    assert config_facts(again) == config_facts(config)
    assert "__float__" not in repr(values)


def test_a_hybrid_is_recorded_and_trains_a_student_without_being_there(tmp_path):
    config = hf.GraniteMoeHybridConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        shared_intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=0,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        layer_types=["mamba", "attention", "mamba", "attention"],
        pad_token_id=0,
    )
    teacher = hf.GraniteMoeHybridForCausalLM(config).eval().requires_grad_(False)
    rows = [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [7, 8, 9, 10]}] * 2
    objective = Objective(LayerMap([(1, 2), (2, 4)]), Features("mse"), outputs=Outputs("forward_kl"))
    cache = TeacherCache.build(tmp_path / "cache", teacher, rows, objective)
    found = recorded_teacher(TeacherCache.open(tmp_path / "cache"))
    assert found.config.time_step_limit[1] == math.inf == config.time_step_limit[1]
    student = shrink(teacher, layers=[1, 2])
    for given in (teacher, None):
        trainer = DistillationTrainer(
            given, student, objective, arguments(tmp_path, max_steps=1), train_dataset=rows, teacher_cache=cache
        )
    trainer.train()
    assert trainer.state.global_step == 1
