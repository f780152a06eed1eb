"""Look before training: do this teacher and this student fit, and if not, what is the fix?"""

from dataclasses import dataclass, field
from html import escape

import torch
from torch import nn

from fakit.models.blocks import check_model, depth, find_stacks, without_adapter
from fakit.models.head_kinds import problem_type
from fakit.models.kinds import is_causal_lm
from fakit.models.load import is_quantized
from fakit.models.massive import Massive, in_words, massive_activations
from fakit.models.peft_students import is_adapted

MASSIVE = (
    "A squared difference of hidden states sees these few numbers alone: take Features('cosine'), "
    "Features('mse', standardize='dimension'), or tokens='later' where they are of first tokens."
)


@dataclass
class Row:
    """One thing that was looked at: `status` is "ok", "warning" or "error"; `fix` is empty when all is well."""

    name: str
    status: str
    teacher: object
    student: object
    fix: str = ""


@dataclass
class PreflightReport:
    """Rows of `preflight`; draws itself in a notebook, prints itself in a terminal."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when no row is an error; warnings may remain."""
        return not self.errors

    @property
    def errors(self) -> list[Row]:
        """The rows that forbid training."""
        return [row for row in self.rows if row.status == "error"]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows: {[row.name for row in self.rows]}")

    def raise_if_error(self) -> None:
        """Raise ValueError with every error's two sides and its fix."""
        if self.errors:
            raise ValueError(
                "teacher and student do not fit: "
                + " ".join(f"{r.name}: teacher has {r.teacher}, student has {r.student}. {r.fix}" for r in self.errors)
            )

    def __str__(self) -> str:
        marks = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
        return "\n".join(
            f"{marks[r.status]}  {r.name}: teacher {r.teacher}, student {r.student}{'. ' + r.fix if r.fix else ''}"
            for r in self.rows
        )

    def _repr_markdown_(self) -> str:
        # hard spaces: a mark that wraps makes every row two lines high
        marks = {"ok": "✓\u00a0ok", "warning": "⚠\u00a0warning", "error": "✗\u00a0**error**"}
        lines = ["| | check | teacher | student | what to do |", "|---|---|---|---|---|"]
        cells = [(marks[r.status], r.name, _cell(r.teacher), _cell(r.student), r.fix) for r in self.rows]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def preflight(
    teacher: nn.Module, student: nn.Module, tokenizer=None, student_tokenizer=None, batch=None
) -> PreflightReport:
    """Compare a teacher and a student before any work is done.

    Args:
        teacher, student: transformers models.
        tokenizer: the teacher's, and the student's too unless `student_tokenizer` is given.
        batch: some texts as both models are given them; with it, massive activations of their hidden states are looked
            for (`fakit.models.massive`), which takes a forward pass of each.

    Returns:
        a report whose rows are ok, warning or error, each with what both sides have and the fix.
    """
    report = PreflightReport()

    def row(name: str, status: str, of_teacher, of_student, fix: str = "") -> None:
        report.rows.append(Row(name, status, of_teacher, of_student, "" if status == "ok" else fix))

    for side, model in (("teacher", teacher), ("student", student)):
        check_model(f"the {side}", model)
    t, s = teacher.config.get_text_config(), student.config.get_text_config()
    deeper = depth(student) > depth(teacher)
    row(
        "layers",
        "warning" if deeper else "ok",
        depth(teacher),
        depth(student),
        "A student deeper than its teacher is unusual.",
    )
    row(
        "hidden size",
        "ok" if t.hidden_size == s.hidden_size else "warning",
        t.hidden_size,
        s.hidden_size,
        "Feature terms learn a linear projection; it is trained with the student and left out of the export.",
    )
    stacks = [[len(stack.blocks) for stack in find_stacks(model)] for model in (teacher, student)]
    if max(map(len, stacks)) == 2:
        row(
            "encoder + decoder layers",
            "ok" if len(stacks[0]) == len(stacks[1]) else "error",
            *(" + ".join(map(str, depths)) for depths in stacks),
            "Layers of an encoder and of a decoder work on different tokens: take a student with both stacks.",
        )
    heads = [getattr(config, "num_attention_heads", None) for config in (t, s)]
    row(
        "attention heads",
        "ok" if heads[0] == heads[1] and heads[0] is not None else "warning",
        *("none" if number is None else number for number in heads),
        "No attention to align: attention=None."
        if None in heads
        else "One-to-one attention alignment is not possible: Attention(..., heads='group-mean').",
    )
    _task_rows(row, teacher, student, t, s)
    if tokenizer is not None:
        _tokenizer_rows(row, tokenizer, student_tokenizer or tokenizer, t, s)
    _state_rows(row, teacher, student, t, s)
    if batch is not None:
        found = [_massive(model, batch) for model in (teacher, student)]
        row("massive activations", "warning" if any(found) else "ok", *map(in_words, found), MASSIVE)
    return report


def _massive(model, batch) -> list[Massive]:
    """Of the embeddings and all blocks but the last, whose states some families norm before they hand them out."""
    given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
    found = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            states = model(**given, output_hidden_states=True)
    finally:
        for module, training in found.items():
            module.training = training
    states = getattr(states, "hidden_states", None) or states.encoder_hidden_states
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    return massive_activations(states[:-1], mask)


def _headless(model) -> str:
    return "encoder" if model.get_output_embeddings() is None else "tokens"


def _task_rows(row, teacher, student, t, s) -> None:
    names = [type(without_adapter(model)).__name__ for model in (teacher, student)]
    kinds = [
        "CausalLM" if is_causal_lm(model) else name.split("For")[-1] if "For" in name else _headless(model)
        for name, model in zip(names, (teacher, student), strict=True)
    ]
    row(
        "task head",
        "ok" if kinds[0] == kinds[1] else "warning",
        *kinds,
        "Different heads: leave the output term out (outputs=None).",
    )
    if kinds[0] == kinds[1] and kinds[0].endswith("Classification"):
        labels = [list(m.config.id2label.values()) for m in (teacher, student)]
        status = "ok" if labels[0] == labels[1] else "error" if len(labels[0]) != len(labels[1]) else "warning"
        row(
            "labels",
            status,
            *(_short(x) for x in labels),
            "Load both with the same labels in the same order (num_labels, id2label).",
        )
        problems = [problem_type(m.config) for m in (teacher, student)]
        if any(problems):
            row(
                "problem type",
                "error" if None not in problems and problems[0] != problems[1] else "ok",
                *(problem or "not stated" for problem in problems),
                "Their logits mean different things: give both configurations one problem_type, or leave the output "
                "term out (outputs=None).",
            )
    elif hasattr(t, "vocab_size") and hasattr(s, "vocab_size"):  # images have none
        same = t.vocab_size == s.vocab_size
        row(
            "vocabulary (logits)",
            "ok" if same else "error",
            t.vocab_size,
            s.vocab_size,
            f"If only padding rows differ, Outputs(vocab_size={min(t.vocab_size, s.vocab_size)}) cuts both to the "
            "shared true vocabulary; if the tokenizers differ, token-by-token matching is not defined: retokenize, or "
            "leave the output term out.",
        )


def _tokenizer_rows(row, teacher_tokenizer, student_tokenizer, t, s) -> None:
    vocabularies = [tokenizer.get_vocab() for tokenizer in (teacher_tokenizer, student_tokenizer)]
    probe = "Distillation aligns 3 layers; naïve students don't."
    pieces = [tokenizer(probe)["input_ids"] for tokenizer in (teacher_tokenizer, student_tokenizer)]
    same = vocabularies[0] == vocabularies[1] and pieces[0] == pieces[1]
    row(
        "tokenizer",
        "ok" if same else "error",
        _tokens(teacher_tokenizer, vocabularies[0], pieces[0], numbered=not same),
        _tokens(student_tokenizer, vocabularies[1], pieces[1], numbered=not same),
        "Teacher and student tokenize differently, so position t is not the same token in both; use the teacher's "
        "tokenizer for the student.",
    )
    sizes = (len(vocabularies[0]), len(vocabularies[1]))
    row(
        "vocabulary fits the embeddings",
        "ok" if sizes[0] <= t.vocab_size and sizes[1] <= s.vocab_size else "error",
        f"{sizes[0]} of {t.vocab_size}",
        f"{sizes[1]} of {s.vocab_size}",
        "A token id beyond the embeddings would crash: model.resize_token_embeddings(len(tokenizer)).",
    )


def _state_rows(row, teacher, student, t, s) -> None:
    lengths = [getattr(c, "max_position_embeddings", None) for c in (t, s)]
    shorter = None not in lengths and lengths[1] < lengths[0]
    row("longest sequence", "warning" if shorter else "ok", *lengths, f"Tokenize with max_length={lengths[1]}.")
    row(
        "mode",
        "warning" if teacher.training else "ok",
        "train (dropout is on)" if teacher.training else "eval",
        "train" if student.training else "eval",
        "A teacher in train mode gives noisy targets: teacher.eval(); load_teacher does so.",
    )
    frozen = [not any(p.requires_grad for p in m.parameters()) for m in (teacher, student)]
    row(
        "trainable",
        "error" if frozen[1] else "ok" if frozen[0] else "warning",
        "no" if frozen[0] else "yes",
        "no" if frozen[1] else "yes",
        "The student has nothing to train: student.requires_grad_(True)."
        if frozen[1]
        else "Freeze the teacher, which saves memory: teacher.requires_grad_(False).",
    )
    precision = [
        "quantized" if is_quantized(m) else str(next(m.parameters()).dtype).removeprefix("torch.")
        for m in (teacher, student)
    ]
    row(
        "precision",
        "error" if is_quantized(student) and not is_adapted(student) else "ok",
        *precision,
        "A quantized student cannot be trained in full: load it unquantized, or train an adapter.",
    )


def _tokens(tokenizer, vocabulary: dict[str, int], ids: list[int], numbered: bool) -> str:
    """The tokenizer's size and the first tokens that it makes of the probe;
    with their ids where two have to be told apart.
    """
    names = {number: token for token, number in vocabulary.items()}
    shown = [f"{names.get(i, '?')} ({i})" if numbered else names.get(i, "?") for i in ids[:5]]
    return f"{type(tokenizer).__name__} of {len(vocabulary)}: {' '.join(shown)} …"


def _cell(value: object) -> str:
    """Text of a markdown table's cell: tokens like `<s>` are no HTML, a bar ends no cell."""
    return escape(str(value), quote=False).replace("|", "\\|")


def _short(labels: list) -> str:
    return f"{len(labels)}: {', '.join(map(str, labels[:4]))}{' …' if len(labels) > 4 else ''}"
