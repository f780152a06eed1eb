"""`measure`: a model in a folder beside its teacher, on a task's texts; what `fakit evaluate` prints and writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fakit.experiments.baselines import prepare_run
from fakit.experiments.build import Prepared, check_lengths, pad_as, tokenizer_beside
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.quiet import without_side_bars
from fakit.experiments.schema import check_whole
from fakit.experiments.scores import parameters_of, scores_of
from fakit.experiments.store import strict_json
from fakit.files import write_whole
from fakit.models.positions import declared_positions, longest_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fakit.evaluation import Generations
    from fakit.tasks import TextTask

FILE = "evaluation.json"
CONFIG = "experiment.yaml"
SHOWN = 3  # samples
PROMPT = 32  # tokens of a text that is continued, where a task has no prompts of its own


@dataclass(frozen=True)
class Measured:
    """What a model in a folder is worth.

    Attributes:
        model: the folder. task, split: what it was measured on; rows: how many.
        scores, teacher: all metrics by name, of the model (with its agreement with the teacher) and of the teacher.
        parameters, teacher_parameters, latency, teacher_latency: numbers, and seconds a batch of `batch` rows, medians.
        samples: {"source", "reference", "student", "teacher"} of the first rows, where the task has targets.
        draft: as `DraftQuality`, where it was asked for.
    """

    model: str
    task: str
    split: str
    rows: int
    scores: dict[str, float]
    teacher: dict[str, float]
    parameters: int
    teacher_parameters: int
    batch: int
    latency: float
    teacher_latency: float
    samples: list[dict[str, str]]
    draft: dict[str, float] | None

    def __str__(self) -> str:
        names = list(self.scores)
        width = max(len(name) for name in [*names, "ms a batch"])
        lines = [f"{self.model}: {self.task}, {self.rows} rows of {self.split}", ""]
        lines.append(f"{'':{width}}  {'student':>12}  {'teacher':>12}")
        for name in names:
            theirs = f"{self.teacher[name]:.4f}" if name in self.teacher else "–"
            lines.append(f"{name:{width}}  {self.scores[name]:12.4f}  {theirs:>12}")
        lines.append(f"{'parameters':{width}}  {self.parameters:12,}  {self.teacher_parameters:12,}")
        lines.append(f"{'ms a batch':{width}}  {1e3 * self.latency:12.1f}  {1e3 * self.teacher_latency:12.1f}")
        for sample in self.samples:
            lines += ["", *(f"{name:9}  {text}" for name, text in sample.items())]
        if self.draft is not None:
            lines += ["", "as a draft of its teacher: " + ", ".join(f"{k} {v:.3g}" for k, v in self.draft.items())]
        return "\n".join(lines)


def configuration_of(folder: Path, given: Path | None) -> ExperimentConfig:
    """The configuration a model is measured by: the one given, or the one that `fakit distill` left beside it."""
    if given is not None:
        return ExperimentConfig.from_yaml(given)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}, which names the task and the teacher of a student of `fakit distill`; give a "
            "configuration that does (--config configs/distill_glosses.yaml)."
        )
    return ExperimentConfig.from_yaml(folder / CONFIG)


def measure(
    folder: str | Path,
    config: ExperimentConfig,
    split: str = "test",
    rows: int | None = None,
    draft: int | None = None,
    write: bool = True,
) -> Measured:
    """Score a saved model on a task's texts beside the teacher, time both, and look at what they write.

    Args:
        folder: what `fakit distill`, `fakit compress` or transformers saved, pairs of low rank too.
        config: its task, teacher, seed, length and device are read.
        split: "test" or "validation".
        rows: the first so many; all unless given.
        draft: of a language model also its worth as a draft that proposes so many tokens, see `draft_quality`.
        write: leave evaluation.json in the folder.

    Raises:
        ValueError: before any work: a split or number that is none, a draft of a classifier; what loading refuses; a
            model that reads other tokens than the teacher, or answers with other outputs.
    """
    from fakit.evaluation import generation_metrics
    from fakit.evaluation.evaluator import written_metrics

    folder = Path(folder)
    if split not in ("test", "validation"):
        raise ValueError(f"split: {split!r} is not one of test, validation.")
    for name, value in (("rows", rows), ("draft", draft)):
        if value is not None:
            check_whole(name, value)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the folder of a saved model.")
    with without_side_bars():
        prepared = prepare_run(config)
        task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
        if draft is not None and task.kind != "causal-lm":
            raise ValueError(f"draft: {task.name} is a {task.kind} task; a draft proposes tokens of a language model.")
        model = _load(folder, task, teacher)
        _check(folder, model, prepared)
    two = prepared.teacher_tokenizer is not None
    if two and draft is not None:
        raise ValueError(
            f"draft: {folder} has a tokenizer of its own, and a draft proposes the teacher's own tokens; leave it out."
        )
    # of each side, with its own tokenizer where there are two
    sides = [(tokenizer, {"test": prepared.test, "validation": prepared.validation}[split]), prepared.of_teacher(split)]
    texts = {"test": task.test, "validation": task.validation}[split]
    writes = bool(written_metrics(task))
    if rows is not None and task.kind == "causal-lm" and not writes:  # a text may be several rows
        texts = texts.select(range(min(rows, len(texts))))
        sides = [(of, task.encode(texts, of, config.training.max_length)) for of, _ in sides]
    elif rows is not None:
        sides = [(of, x.select(range(min(rows, len(x))))) for of, x in sides]
    encoded = sides[0][1]
    for side, one, (_, x) in zip(("model", "teacher"), (model, teacher), sides, strict=True):
        if side == "model" or two:
            check_lengths(x, config.training.max_length, **{side: one})
    written = [
        generation_metrics(one, x, of) if writes else None for one, (of, x) in zip((model, teacher), sides, strict=True)
    ]
    scores = scores_of(model, encoded, task, tokenizer, None if two else teacher, generated=written[0])
    theirs = scores_of(teacher, sides[1][1], task, sides[1][0], generated=written[1])
    samples: list[dict[str, str]] = []
    if writes:
        samples = _beside(*written, scores, theirs)
    elif task.kind == "causal-lm":
        both = ((model, tokenizer, scores), (teacher, sides[1][0], theirs))
        _read(both, list(texts["text"])[:rows], config)
    timed = [_timed(one, task, *side) for one, side in zip((model, teacher), sides, strict=True)]
    (batch, _), seconds = timed[0], [found for _, found in timed]
    found = Measured(
        model=str(folder),
        task=task.name,
        split=split,
        rows=len(encoded),
        scores=scores,
        teacher=theirs,
        parameters=parameters_of(model),
        teacher_parameters=parameters_of(teacher),
        batch=batch,
        latency=seconds[0],
        teacher_latency=seconds[1],
        samples=samples,
        draft=None if draft is None else _drafted(model, teacher, encoded, tokenizer, draft, writes),
    )
    if write:
        facts = {**asdict(found), "config": config.to_dict()}
        write_whole(folder / FILE, json.dumps(strict_json(facts), indent=1, allow_nan=False))
    return found


def _load(folder: Path, task: TextTask, teacher: PreTrainedModel) -> PreTrainedModel:
    from transformers.models.auto import modeling_auto

    from fakit.compression import low_rank
    from fakit.models.load import load_teacher
    from fakit.models.low_rank_linear import FILE as PAIRS

    if not (folder / PAIRS).is_file():
        model = load_teacher(folder, task.model_task, device=teacher.device)
    else:
        model = low_rank.load(folder, teacher.device)
        classes = {
            "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        }[task.model_task]
        if classes.get(model.config.model_type) != type(model).__name__:
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, and {task.name} is a {task.kind} task; give the "
                "configuration of the model's own task (--config)."
            )
    pad_as(model, teacher.config.pad_token_id)
    return model


def _check(folder: Path, model: PreTrainedModel, prepared: Prepared) -> None:
    """Raise ValueError where model and teacher do not read the same tokens or answer with the same outputs."""
    from fakit.models.preflight import preflight
    from fakit.tasks.two_tokenizers import differ

    own, aside = tokenizer_beside(folder), ["trainable"]  # it is only looked at
    if prepared.teacher_tokenizer is None:
        report = preflight(prepared.teacher, model, None if own is None else prepared.tokenizer, own)
    else:
        report = preflight(prepared.teacher, model)
        aside.append("vocabulary (logits)")
        if own is None or differ(own, prepared.tokenizer):
            raise ValueError(
                f"{folder} has {'no' if own is None else 'another'} tokenizer than the model at student.path "
                f"({prepared.config.student.path}), in whose tokens the task is encoded; give the configuration of "
                "this model (--config)."
            )
    report.rows = [row for row in report.rows if row.name not in aside]
    report.raise_if_error()


def _beside(ours: Generations, its: Generations, scores, theirs) -> list[dict[str, str]]:
    """The first texts of both beside each other; adds BLEU and ROUGE to the scores of models that are not NaN."""
    for written, of_one in ((ours, scores), (its, theirs)):
        # a question says nothing as an answer
        told = [name for name in written.metrics if "cer_copy" in of_one or not name.endswith("_copy")]
        lost = math.isnan(of_one["nll"])
        of_one.update({name: math.nan if lost else written.metrics[name] for name in told})
    beside = zip(ours.sources, ours.references, ours.outputs, its.outputs, strict=True)
    names = ("source", "reference", "student", "teacher")
    return [dict(zip(names, row, strict=True)) for row, _ in zip(beside, range(SHOWN), strict=False)]


def _read(both, texts, config) -> None:
    """Adds bits per byte of the raw texts, by which they compare with models of any tokenizer, to the scores of each
    (model, tokenizer, scores).
    """
    from fakit.evaluation import perplexity

    for one, tokenizer, of_one in both:
        positions = declared_positions(one)
        window = min(config.training.max_length, positions or config.training.max_length)
        of_one["bits_per_byte"] = perplexity(one, tokenizer, texts, window=window).bits_per_byte


def _timed(model, task, tokenizer, encoded, rows: int = 8) -> tuple[int, float]:
    """Median seconds of a forward pass over rows of median length."""
    from fakit.evaluation import latency
    from fakit.evaluation.batches import to_device

    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    first = max(0, len(order) // 2 - rows // 2)
    chosen = encoded.select(sorted(order[first : first + rows])).to_list()
    batch = task.collator(tokenizer)(chosen)
    return len(chosen), latency(model, to_device(batch, model.device)).median


def _drafted(model, teacher, encoded, tokenizer, tokens: int, writes: bool) -> dict[str, float]:
    """Args: writes: whether rows are prompts and their answers; else a text's first tokens are the prompt."""
    from fakit.evaluation import draft_quality, split_prompts
    from fakit.evaluation.generation import ends_of

    rows = encoded.select(range(min(16, len(encoded)))).to_list()
    if writes:
        prompts, targets = split_prompts(rows, ends_of(rows, tokenizer))
        longest = max(len(target) for target in targets) + 1
    else:
        prompts, longest = [row["input_ids"][:PROMPT] for row in rows], 64
    limits = [found for found in map(longest_row, (model, teacher)) if found is not None]
    longest = max(1, min([longest, *(limit - max(map(len, prompts)) for limit in limits)]))
    found = draft_quality(model, teacher, prompts, tokenizer.eos_token_id, tokenizer.pad_token_id, longest, tokens)
    derived: dict[str, Any] = {
        "speedup": found.speedup,
        "expected_speedup": found.expected_speedup,
        "sampled_tokens_a_pass": found.sampled_tokens_a_pass,
    }
    return asdict(found) | derived
