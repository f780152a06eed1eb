"""The blocks of a model, found by one rule."""

import pytest
import transformers as hf

from fakit.models import find_blocks
from fakit.models.blocks import depth, find_block_list
from tests.families import FAMILIES, LAYERS, VOCAB, WIDTH, tiny

NAMES = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "modernbert": "model.layers",
    "deberta-v2": "deberta.encoder.layer",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt-neox": "gpt_neox.layers",
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "phi": "model.layers",
    "mixtral": "model.layers",
    "bloom": "transformer.h",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_blocks_in_order(family):
    model = tiny(family, "eager")
    assert depth(model) == LAYERS
    assert find_block_list(model)[0] == NAMES[family]
    assert find_blocks(model) == [model.get_submodule(f"{NAMES[family]}.{i}") for i in range(LAYERS)]


def test_a_list_of_as_many_experts_inside_a_block_is_no_second_list():
    model = tiny("bert", num_hidden_layers=2)
    model.bert.encoder.layer[0].experts = hf.pytorch_utils.nn.ModuleList([model.classifier, model.classifier])
    assert find_blocks(model) == list(model.bert.encoder.layer)


def test_a_depth_that_no_list_has_names_the_lists_there_are():
    model = tiny("bert")
    model.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match=r"counts 5 layers, and 0 .* lists found: bert.encoder.layer \(3 × BertLayer\)"
    ):
        find_blocks(model)


def test_encoder_and_decoder_are_two_lists():
    config = hf.BartConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32
    )
    with pytest.raises(
        ValueError, match=r"counts 2 layers, and 2 of its module lists could be its blocks.*BartDecoderLayer"
    ):
        find_blocks(hf.BartForConditionalGeneration._from_config(config))


def test_a_model_without_layers_says_so():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    config.num_layers = config.num_hidden_layers = None
    model = tiny("bert")
    model.config = config
    with pytest.raises(ValueError, match=r"configuration \(SwinConfig\) names no num_hidden_layers"):
        depth(model)
