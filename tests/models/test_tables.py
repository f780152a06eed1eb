"""Tables of tokens, positions and types: what a model can read is what it says here,
and data beyond it are refused before work.
"""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from fakit import DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, TeacherCache
from fakit.models.tables import check_data, extent_of_data, tables
from tests.training.runs import arguments

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
STACKS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
STACKS |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50}


def roberta(vocab: int = 50, positions: int = 14, classes: int = 2, **settings):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocab, "max_position_embeddings": positions, "num_labels": classes}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, type_vocab_size=1, **settings)).eval()


MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=12)),
    "roberta": roberta,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 12})
    ),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=2, hidden_dim=24, max_position_embeddings=12)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_row_as_long_as_the_positions_is_read_and_one_token_more_is_not(name):
    model = MODELS[name]().eval()
    found = tables(model).encoder
    assert (found.tokens, found.positions) == (50, 12)
    with torch.no_grad():
        model(torch.full((1, 12), 49))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 13), 49))
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 50))


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_both_stacks_have_tables_of_their_own(kind):
    config = {"bart": BartConfig, "marian": MarianConfig}[kind](**STACKS, max_position_embeddings=12, pad_token_id=1)
    model = {"bart": BartForConditionalGeneration, "marian": MarianMTModel}[kind](config).eval()
    found = tables(model)
    assert (found.encoder.tokens, found.encoder.positions, found.decoder.tokens, found.decoder.positions) == (
        50,
        12,
    ) * 2
    ids = torch.full((1, 12), 49)
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
        with pytest.raises(IndexError):
            model(input_ids=ids, decoder_input_ids=torch.full((1, 13), 49))


def test_rotary_and_relative_positions_have_no_end():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=12))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    assert tables(llama).encoder.positions is None and tables(llama).encoder.tokens == 50
    assert tables(t5).encoder.positions is None and tables(t5).decoder.positions is None


def rows(tokens: int = 6, highest: int = 40, labels: object = None, count: int = 6, **columns) -> list[dict]:
    labels = [i % 2 for i in range(count)] if labels is None else labels
    made = [{"input_ids": [3 + (i + j) % 9 for j in range(tokens - i % 2)], "labels": labels[i]} for i in range(count)]
    made[-1]["input_ids"][0] = highest
    for row in made:
        row["attention_mask"] = [1] * len(row["input_ids"])
        row |= {name: [value] * len(row["input_ids"]) for name, value in columns.items()}
    return made


class Padding:
    """A collator of one's own: rows are filled up with 0."""

    def __call__(self, features):
        longest = max(len(f["input_ids"]) for f in features)
        batch = {
            name: torch.tensor([[*f[name], *[0] * (longest - len(f[name]))] for f in features])
            for name in features[0]
            if name != "labels"
        }
        return batch | {"labels": torch.tensor([f["labels"] for f in features])}


def train(tmp_path, data, collator, teacher=None, student=None, objective=None, cached=False):
    teacher, student = teacher or roberta(), student or roberta()
    objective = objective or Objective(LayerMap([(1, 2)]), Features(), outputs=Outputs(), task=Task())
    cache = TeacherCache.build(tmp_path / "cache", teacher, data, objective, dtype="float32") if cached else None
    trainer = DistillationTrainer(
        teacher,
        student,
        objective,
        arguments(tmp_path, max_steps=3),
        train_dataset=data,
        data_collator=collator,
        teacher_cache=cache,
    )
    trainer.train()
    return trainer


class Tokens:
    """As much of a tokenizer as transformers' padding collator asks for."""

    pad_token_id = 0
    padding_side = "right"

    def pad(self, features, **options):
        return Padding()(features)


WRONG = {
    "a token beyond the teacher": (
        lambda: {"data": rows(highest=50), "student": roberta(60)},
        r"holds token 50 in input_ids, which is beyond the teacher; the teacher \(Roberta\w+\) has 50, the student \(Roberta\w+\) has 60",
    ),
    "a token beyond the student": (
        lambda: {"data": rows(highest=55), "teacher": roberta(60)},
        "token 55 in input_ids, which is beyond the student; the teacher .* has 60, the student .* has 50",
    ),
    "a token below 0": (lambda: {"data": rows(highest=-1)}, "holds token -1 in input_ids, which is below 0"),
    "rows beyond the student's positions": (
        lambda: {"data": rows(tokens=10), "student": roberta(positions=10)},
        r"rows of up to 10 tokens.*the teacher \(Roberta\w+\) has 12, the student \(Roberta\w+\) has 8.*max_length=8",
    ),
    "a type beyond": (
        lambda: {"data": rows(token_type_ids=1)},
        "holds type 1 in token_type_ids.*beyond the teacher and the student",
    ),
    "a label beyond": (
        lambda: {"data": rows(labels=[0, 1, 2] * 2)},
        "2 in labels, and Roberta.* knows labels from 0 to 1",
    ),
    "a label of -1": (
        lambda: {"data": rows(labels=[0, -1, -100] * 2)},
        "-1 in labels, and Roberta.* labels from 0 to 1",
    ),
    "floats for classes": (
        lambda: {"data": rows(labels=[0.0, 1.0] * 3)},
        r"floats \(0 to 1\) in labels.*classes, which are integers",
    ),
    "too few labels a text": (
        lambda: {"data": rows(labels=[[1.0]] * 6)},
        r"has 1 to 1 labels a row in labels, and Roberta.* has 2",
    ),
    "several labels beyond 1": (
        lambda: {"data": rows(labels=[[1.0, 3.0]] * 6)},
        "3 in labels, .* 2 independent labels of 0 to 1",
    ),
}


@pytest.mark.parametrize("given", ["datasets", "list", "stream of batches"])
@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_a_side_cannot_read_are_refused_before_work(wrong, given, tmp_path):
    make, message = WRONG[wrong]
    settings = make()
    data = settings.pop("data")
    objective = Objective(None, task=Task()) if "label" in wrong or "floats" in wrong else None
    if given == "datasets":
        data = Dataset.from_list(data)
    collator = Padding() if given == "stream of batches" else DataCollatorWithPadding(Tokens())
    if given == "stream of batches":  # what the collator makes is looked at, in the step's own order
        data = data[::-1]
    with pytest.raises(ValueError, match=message) as raised:
        train(tmp_path, data, collator, objective=objective, **settings)
    assert ("a batch" if given == "stream of batches" else "train_dataset") in str(raised.value)


def test_what_can_be_read_trains(tmp_path):
    data = Dataset.from_list(rows(tokens=12, highest=49, labels=[0, 1, -100, 1, 0, 1]))
    assert train(tmp_path, data, DataCollatorWithPadding(Tokens())).state.global_step == 3


def test_a_cache_and_a_dataset_for_evaluation_are_looked_at_too(tmp_path):
    with pytest.raises(ValueError, match=r"the data set holds token 50 in input_ids, which is beyond the teacher"):
        train(tmp_path, rows(highest=50), default_data_collator, student=roberta(60), cached=True)
    trainer = DistillationTrainer(
        roberta(),
        roberta(positions=10),
        Objective(None, outputs=Outputs()),
        arguments(tmp_path),
        train_dataset=rows(),
        eval_dataset={"near": rows(), "far": rows(tokens=9)},
        data_collator=DataCollatorWithPadding(Tokens()),
    )
    with pytest.raises(ValueError, match=r"eval_dataset\['far'\] has rows of up to 9 tokens.*the student .* has 8"):
        trainer.train()


def test_a_cached_teachers_tables_do_not_matter_in_training(tmp_path):
    data = rows()
    assert train(tmp_path, data, DataCollatorWithPadding(Tokens()), cached=True).state.global_step == 3


def test_targets_are_read_by_the_decoder():
    model = BartForConditionalGeneration(BartConfig(**STACKS, max_position_embeddings=12, pad_token_id=1))
    sides = {"teacher": tables(model), "student": tables(model)}
    source = {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]}
    collator = DataCollatorForSeq2Seq(Tokens())
    check_data([source | {"labels": [4, -100, 49]}], collator, sides, "rows", task=False)
    with pytest.raises(ValueError, match="holds token 50 in labels, which is beyond the teacher and the student"):
        check_data([source | {"labels": [4, 50]}], collator, sides, "rows", task=False)
    with pytest.raises(ValueError, match="rows of up to 13 tokens in labels"):
        check_data([source | {"labels": [4] * 13}], collator, sides, "rows", task=False)
    with pytest.raises(ValueError, match="holds token -2 in labels, which is below 0"):
        check_data([source | {"labels": [4, -2, -100]}], collator, sides, "rows", task=False)


def test_a_padding_token_beyond_the_table_is_refused_where_rows_are_padded():
    class Other(Tokens):
        pad_token_id = 50

    sides = {"student": tables(roberta())}
    with pytest.raises(ValueError, match="holds token 50 in input_ids"):
        check_data(rows(), DataCollatorWithPadding(Other()), sides, "rows", task=True)
    check_data(rows(count=1), DataCollatorWithPadding(Other()), sides, "rows", task=False)


def test_labels_of_tokens():
    model = BertForTokenClassification(BertConfig(**SIZES, max_position_embeddings=12, num_labels=3))
    sides = {"student": tables(model)}
    data = [{"input_ids": [3, 4], "labels": [2, -100]}]
    check_data(data, default_data_collator, sides, "rows", task=True)
    with pytest.raises(ValueError, match="holds 3 in labels, and BertForTokenClassification knows labels from 0 to 2"):
        check_data([{"input_ids": [3, 4], "labels": [3, -100]}], default_data_collator, sides, "rows", task=True)


def test_selected_rows_alone_are_looked_at_and_transforms_are_left_to_the_batches():
    data = Dataset.from_list(rows(highest=999))
    assert extent_of_data(data).highest["input_ids"] == 999
    assert extent_of_data(data.select(range(5))).highest["input_ids"] < 50
    assert extent_of_data(data.with_transform(lambda row: row)) is None
    assert extent_of_data(iter([])) is None
