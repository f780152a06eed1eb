"""Whether teacher, student and objective can train together: asked before any work, answered with both sides."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.models.blocks import check_model, stack_depths, without_adapter
from fakit.models.head_kinds import problem_type, without_logits
from fakit.models.preflight import preflight
from fakit.objective.attention import Attention
from fakit.objective.features import Features
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs, check_distribution
from fakit.tracing.capture import check_attention
from fakit.tracing.lens import find_lens

SIDES = ("student", "teacher")


_TWO_TOKENIZERS = (
    "With a tokenizer of its own each, the outputs term alone can compare: outputs: {loss: uld}, or {align: text}; "
    "features: null and attention: null."
)


def token_by_token(objective: Objective) -> list[str]:
    """The terms that compare teacher and student token by token, so that both must have one tokenizer."""
    return [name for name, term in objective.terms.items() if objective.needs_of(name, "teacher") and term.same_tokens]


def check_two_tokenizers(objective: Objective, cached: bool = False, on_policy: bool = False) -> None:
    """Raise ValueError for what takes a teacher and a student of one tokenizer."""
    if names := token_by_token(objective):
        raise ValueError(
            "teacher and student have tokenizers of their own, and position t is not the same token in both, as "
            f"{', '.join(names)} would take it. {_TWO_TOKENIZERS}"
        )
    if cached or on_policy:
        asked, why = (
            ("a teacher cache", "holds what the teacher said of the student's tokens")
            if cached
            else ("on_policy", "has the teacher score the student's tokens")
        )
        raise ValueError(
            f"{asked} {why}, and the teacher has a tokenizer of its own; leave it out, or take a teacher and a student "
            "of one tokenizer."
        )


def refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError where both hold the same parameters: freezing the teacher would freeze the student."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters "
            f"({', '.join(shared[:3])}{' …' if shared[3:] else ''}): the teacher is frozen, and they with it. Give the "
            "student weights of its own: shrink(teacher, …) copies them, copy.deepcopy(teacher) too."
        )


def check_fit(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    objective: Objective,
    teacher_tokenizer=None,
    student_tokenizer=None,
) -> None:
    """Raise ValueError when these three cannot train together: both sides and the fix, before any work."""
    for side, model in (("teacher", teacher), ("student", student)):
        check_model(f"the {side}", model)
    if not isinstance(objective, Objective):
        raise ValueError(
            f"the objective is {objective!r}, and an Objective was expected, such as Objective(outputs=Outputs())."
        )
    objective.check_layers(stack_depths(student), stack_depths(teacher))
    both = teacher_tokenizer is not None and student_tokenizer is not None
    report = preflight(teacher, student, teacher_tokenizer if both else None, student_tokenizer if both else None)
    if token_by_token(objective):
        for row in report.rows:
            if row.name == "tokenizer":
                row.fix = f"{row.fix} {_TWO_TOKENIZERS}"
    else:
        report.rows = [row for row in report.rows if row.name != "tokenizer"]
    outputs = objective.of_kind(Outputs).values()
    compares = any(objective.needs_of(name, "teacher").logits for name in objective.terms)
    # cut to what both have, or of sorted probabilities
    any_sizes = [term.vocab_size is not None or not term.same_tokens for term in outputs]
    if not compares or (any_sizes and all(any_sizes)):
        report.rows = [row for row in report.rows if row.name not in ("labels", "vocabulary (logits)", "problem type")]
    report.raise_if_error()
    _check_heads(teacher, student, objective)

    s, t = student.config.get_text_config(), teacher.config.get_text_config()
    for name, features in objective.of_kind(Features).items():
        if objective.pairs(name) and features.projection is None and features.projects(s.hidden_size, t.hidden_size):
            raise ValueError(
                f"the student is {s.hidden_size} wide, the teacher {t.hidden_size}, and Features(projection=None) "
                "allows no projection; use projection='linear', or a student of the teacher's width."
            )
    needs = [objective.needs_of(name, "student") for name in objective.terms]
    inside = any(term.at != "block" for term in objective.of_kind(Features).values())
    outputs = inside or any(asked.attention_outputs for asked in needs)
    if outputs or any(asked.attentions for asked in needs):
        for model in (student, teacher):
            check_attention(model, outputs)
    if any(asked.lens for asked in needs) and isinstance(teacher, PreTrainedModel):  # of a cache its own check says so
        for model in (student, teacher):
            find_lens(model)
    heads = [getattr(config, "num_attention_heads", None) for config in (s, t)]  # none where nothing attends (Mamba)
    for name, attention in objective.of_kind(Attention).items():
        one_to_one = attention.loss != "relations" and attention.heads == "one-to-one"
        if objective.pairs(name) and one_to_one and heads[0] != heads[1]:
            raise ValueError(
                f"one-to-one attention alignment: the student has {heads[0]} heads, the teacher {heads[1]}. Use "
                "Attention(..., heads='group-mean' or 'best-match'), Attention('relations'), or shrink(teacher, "
                f"heads={heads[1]})."
            )


def _check_heads(teacher: PreTrainedModel, student: PreTrainedModel, objective: Objective) -> None:
    for side, model in (("student", student), ("teacher", teacher)):
        asked = [name for name in objective.terms if objective.needs_of(name, side).logits]
        instead = without_logits(model) if asked else None
        if instead is not None:
            needing = dict.fromkeys(n for n in objective.terms if any(objective.needs_of(n, s).logits for s in SIDES))
            raise ValueError(
                f"the {' and '.join(asked)} term{'s compare' if asked[1:] else ' compares'} logits, and the {side}, "
                f"{type(without_adapter(model)).__name__}, returns {instead} in their place. Train it with features "
                f"and attention alone ({', '.join(f'{name}=None' for name in needing)}), or take models whose head "
                "returns logits."
            )
    problem = problem_type(student.config) or problem_type(teacher.config)
    pools = without_adapter(student).get_output_embeddings() is None and hasattr(without_adapter(student), "num_labels")
    for outputs in objective.of_kind(Outputs).values():
        if pools and not callable(outputs.loss) and outputs.loss != "logit_mse":
            check_distribution(outputs.loss, problem, student.config.num_labels)


def check_parameters(side: str, model: nn.Module) -> None:
    """Raise ValueError for NaN in the weights, before they are trained or taught from."""
    given = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and p.device.type != "meta"]
    flags: dict[torch.device, list[Tensor]] = {}
    for _, p in given:
        flags.setdefault(p.device, []).append(p.detach().isnan().any())
    if not any(torch.stack(found).any() for found in flags.values()):  # waits for each device once
        return
    names = [name for name, p in given if p.detach().isnan().any()]
    raise ValueError(
        f"the {side} ({type(without_adapter(model)).__name__}) holds NaN in {len(names)} of its parameters before "
        f"training: {', '.join(names[:3])}{' …' if names[3:] else ''}. Load it again, from whole files."
    )
