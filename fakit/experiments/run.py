"""`run_experiment`: one configuration from data to numbers; what `fakit distill` and the notebooks call."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from fakit.experiments.build import (
    Prepared,
    TrainingRows,
    build_arguments,
    build_objective,
    build_student,
    build_training_rows,
    check_lengths,
    prepare,
    student_tokenizer,
)
from fakit.experiments.config import OLD_NAMES, ExperimentConfig, by_names
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import RunStore, strict_json
from fakit.files import check_room, claimed, write_whole
from fakit.training.checkpoints import (
    began_in_bf16,
    checkpoints,
    differences,
    flaw,
    last_whole_checkpoint,
    versions,
    was_finished,
)
from fakit.training.precision import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from fakit.training.trainer import DistillationTrainer

RUN = "run.json"
logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What one run gave; draws itself in a notebook, prints itself in a terminal, and is one line of a store.

    Attributes:
        metric, score: the task's headline metric and its value on the test split.
        higher_is_better: which way `score` improves.
        validation, test: all metrics by name; test also has the agreement with the teacher.
        steps, seconds: optimizer steps, and the wall time of training alone (of a resumed run: since it was resumed).
        flops_per_step, flops: of one optimizer step and of all, teacher included; None with a quantized teacher, whose
            kernels no counter sees, with balancing by gradient norms, with a cache, whose teacher worked elsewhere,
            and in a study that does not count them.
        teacher_cache: the precision of the cache that stood for the teacher; None where the teacher itself answered in
            each step.
        precision: what training computed in, "float32" or "bf16" (autocast): what `bf16: auto` came to. Evaluation is
            in float32.
        labeled, unlabeled: training rows.
        dropped: rows of the task's data that are in no split, by reason.
        versions, data: what the run was made with, and the fingerprint of the texts it was evaluated on; None in
            records of before.
        history: the logged steps. student: the trained model; None when the run was read from a store.
    """

    run_id: str
    task: str
    arm: str
    seed: int
    metric: str
    score: float
    higher_is_better: bool
    validation: dict[str, float]
    test: dict[str, float]
    steps: int
    seconds: float
    flops_per_step: float | None
    flops: float | None
    parameters: int
    teacher_parameters: int
    labeled: int
    unlabeled: int
    config: dict[str, Any]
    finished: str
    kind: str = "run"
    teacher_cache: str | None = None
    precision: str | None = None  # of records from before it was noted
    dropped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] | None = None
    data: str | None = None
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    student: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The line of runs.jsonl: everything but the history, which goes to steps.jsonl, and the model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("history", "student")}

    @classmethod
    def from_store(cls, store: RunStore, run_id: str) -> RunResult:
        """A recorded run again, without its model."""
        steps = store.steps(run_id).drop(columns="run_id")
        history = [{k: v for k, v in row.items() if not pd.isna(v)} for row in steps.to_dict("records")]
        record = store.record(run_id)
        for name in ("validation", "test"):  # JSON has no nan: a student that diverged has null for a score
            record[name] = {metric: math.nan if value is None else value for metric, value in record[name].items()}
        record["score"] = math.nan if record["score"] is None else record["score"]
        return cls(**record, history=history)

    def __str__(self) -> str:
        agreement = f", agreement with the teacher {self.test['agreement']:.3f}" if "agreement" in self.test else ""
        return (
            f"{self.task}, {self.arm}, seed {self.seed}: test {self.metric} {self.score:.4f}{agreement} "
            f"after {self.steps} steps in {self.seconds:.0f} s" + (f", {self.precision}" if self.precision else "")
        )

    def _repr_markdown_(self) -> str:
        names = [*self.test, *(name for name in self.validation if name not in self.test)]
        rows = [f"| {n} | {self.validation.get(n, math.nan):.4f} | {self.test.get(n, math.nan):.4f} |" for n in names]
        return "\n".join([f"**{self}**", "", "| metric | validation | test |", "|---|---|---|", *rows]).replace(
            "nan", "–"
        )


def run_experiment(
    config: ExperimentConfig,
    store: RunStore | str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    progress: bool = True,
    prepared: Prepared | None = None,
    count_flops: bool = True,
    teacher_cache: str | Path | None = None,
    cache_dtype: str = "bfloat16",
) -> RunResult:
    """Train a student as configured, evaluate it on validation and test, export and record it.

    Everything random follows `config.seed`: runs that share it start from the same student, see the same labeled
    texts in the same order, and may be compared in pairs.

    Args:
        store: a `RunStore` or its folder (made when missing): the finished run is added to it. None records nothing.
        resume: a run that is recorded is returned as recorded; one whose student is in `config.out` is evaluated and
            recorded; one with checkpoints there goes on from the last whole one. All of it must be of this run: the
            same configuration but for `out` and how often it logs, evaluates and saves; the same data, teacher and
            versions. More steps are another run, whose learning rate falls otherwise from the first step on.
        callbacks: of transformers, passed to the trainer.
        progress: say on standard error where the run stands: steps, loss by term, time left
            (`fakit.training.progress`).
        prepared: what `prepare` gave for a configuration of the same task, teacher, seed and length, so that many runs
            load it once.
        count_flops: count a step's FLOPs, which costs the time of some steps.
        teacher_cache: a folder. The teacher answers each training text once, into a `TeacherCache` there, and the steps
            read it; runs of the same texts (task, labels, seed, length) whose terms ask for the same layers share it.
        cache_dtype: how it is stored: "float32", "bfloat16", "float16" or "int8".

    Raises:
        ValueError: before any training, for parts that do not fit, a run that is recorded while `resume` is off, a
            folder that holds another run's or a finished student, that another run writes to at this moment,
            or that has no room.
    """
    store = RunStore.open(store) if isinstance(store, str | Path) else store
    if store is not None and store.has(config.run_id):
        if resume:
            return RunResult.from_store(store, config.run_id)
        raise ValueError(
            f"{config.run_id} is recorded in {store.path} already. resume=True (--resume) returns it; "
            "change the seed or another key for a new run."
        )
    if teacher_cache is not None and not config.transfers:
        raise ValueError(
            f"a teacher cache was asked for in {teacher_cache}, and the arm {config.arm!r} has no term that looks at a "
            "teacher (features, attention, outputs): leave the cache out, or turn one on."
        )
    with _alone(config, store):
        return _run(config, store, resume, callbacks, progress, prepared, count_flops, teacher_cache, cache_dtype)


def _run(config, store, resume, callbacks, progress, prepared, count_flops, teacher_cache, cache_dtype) -> RunResult:
    """`run_experiment`, alone in its folder."""
    from transformers import PrinterCallback, set_seed

    from fakit.training.fit import check_fit
    from fakit.training.ownership import bytes_of_checkpoint, data_fingerprint
    from fakit.training.progress import ProgressBar
    from fakit.training.teacher_cache import TeacherCache
    from fakit.training.trainer import DistillationTrainer

    out = None if config.out is None else Path(config.out)
    finished = None if out is None else _finished(config, out, resume)
    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(out / "checkpoints")
    with without_side_bars(), folder as folder:
        args = build_arguments(config, folder)
        checkpoint = _checkpoint(Path(folder), args.world_size) if resume and finished is None else None
        if checkpoint is not None and config.training.bf16 == AUTO:
            began = began_in_bf16(checkpoint)
            args.bf16 = args.bf16 if began is None else began
        set_seed(config.seed)
        prepared = prepared or prepare(config, args.device)
        prepared.check(config)
        task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
        set_seed(config.seed)  # the student's first weights depend on the seed alone, not on what loading drew
        student = build_student(config, teacher, task)
        rows = build_training_rows(config, task, tokenizer, processes=args.world_size)
        objective = build_objective(config, student, teacher)
        check_fit(teacher, student, objective, tokenizer, student_tokenizer(config))
        for split in (rows.rows, prepared.validation, prepared.test):
            check_lengths(split, config.training.max_length, teacher=teacher, student=student)
        _rehearse(student, prepared, args.device)
        facts = {"versions": versions(), "data": data_fingerprint(rows.rows)}
        if finished is not None and (other := differences({key: finished[key] for key in facts}, facts)):
            raise ValueError(_refusal(out, other))
        if out is not None:
            check_room(out, bytes_of_checkpoint(student, objective, "none"), "the student")
        cache = None
        if teacher_cache is not None:
            cache = TeacherCache.build(
                teacher_cache, teacher, rows.rows, objective, dtype=cache_dtype, tokenizer=tokenizer
            )
        trainer = DistillationTrainer(
            teacher,
            student,
            objective,
            args=args,
            teacher_cache=cache,
            train_dataset=rows.dataset(),
            eval_dataset=prepared.validation,
            data_collator=task.collator(tokenizer),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # what stands in for a progress bar that was switched off
        bar = ProgressBar(objective.weights)
        if progress:
            trainer.add_callback(bar)
        trainer.bound_to = {"config": _binding(config.to_dict())}
        if objective.layer_map.is_random:
            trainer.epochs.steps = _steps_a_pass(rows, args)
        main = trainer.is_world_process_zero()
        if finished is None:
            flops_per_step = step_flops(trainer, rows) if count_flops and cache is None else None
            begun = {"run_id": config.run_id, "config": config.to_dict(), **facts, "finished": None}
            if out is not None and main:
                write_whole(out / RUN, json.dumps(begun, indent=1, allow_nan=False))
            with closing(bar):
                trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            student = trainer.whole_student()
            done = {
                "steps": trainer.state.global_step,
                "seconds": trained.metrics["train_runtime"],
                "flops_per_step": flops_per_step,
                "flops": None if flops_per_step is None else flops_per_step * trainer.state.global_step,
                "teacher_cache": None if cache is None else cache.content.dtype,
                "precision": trainer.precision,
                "history": _history(trainer.state.log_history),
            }
            if out is not None and main:  # before anything else that may fail
                student.save_pretrained(out)
                tokenizer.save_pretrained(out)
                config.to_yaml(out / "experiment.yaml")
                write_whole(out / RUN, json.dumps(strict_json({**begun, "finished": done}), indent=1, allow_nan=False))
        else:
            done = finished["finished"]
            done["history"] = [{k: v for k, v in row.items() if v is not None} for row in done["history"]]
            student = type(student).from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
            student = student.to(args.device)

    scores = _evaluate(student, prepared.test, task, tokenizer, prepared.reference())
    result = RunResult(
        run_id=config.run_id,
        task=task.name,
        arm=config.arm,
        seed=config.seed,
        metric=task.metric,
        score=scores[task.metric],
        higher_is_better=task.metric not in LOWER_IS_BETTER,
        validation=_evaluate(student, prepared.validation, task, tokenizer),
        test=scores,
        parameters=_parameters(student),
        teacher_parameters=_parameters(teacher),
        labeled=rows.labeled,
        unlabeled=len(rows.rows) - rows.labeled,
        config=config.to_dict(),
        finished=now(),
        versions=versions(),
        data=prepared.fingerprint(),
        dropped=task.dropped,
        student=student,
        **done,
    )
    if main and store is not None:
        store.append_steps(config.run_id, result.history)
        store.append_run(result.record())
    return result


# -- whose folder it is -----------------------------------------------------------------------------------------------


@contextmanager
def _alone(config: ExperimentConfig, store: RunStore | None) -> Iterator[None]:
    """Hold the run's place in the store and its folder, so that a second run of them says so at once."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first holds them for all
        yield
        return
    with ExitStack() as held:
        if store is not None:
            check_room(store.path, 2**20, "the record of the run")
            held.enter_context(claimed(store.path / f".{config.run_id}.lock", f"{config.run_id} in {store.path}"))
        if config.out is not None:
            out = Path(config.out)
            if not out.exists():
                held.callback(_remove_if_empty, out)  # where the run was refused
            check_room(out, 0, "the student")
            held.enter_context(claimed(out / ".run.lock", str(out)))
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _finished(config: ExperimentConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """What run.json says of a student that is trained and not recorded; None where there is training to do.

    Raises:
        ValueError: what lies in the folder is not this run's, or is and `resume` is off.
    """
    student = [p.name for pattern in ("*.safetensors", "*.bin", "config.json") for p in out.glob(pattern)]
    saved = checkpoints(out / "checkpoints")
    path = out / RUN
    if not path.is_file():
        if student:
            raise ValueError(
                f"{out} holds a model already ({', '.join(sorted(student)[:3])}), which the student would overwrite; "
                "choose another folder for it (out), or remove that one."
            )
        if saved and not resume:
            raise ValueError(
                f"{out} holds checkpoints up to step {saved[-1][0]}; resume=True (--resume) goes on from them, or "
                "choose another `out`."
            )
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, finished = found["config"], found["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); choose another folder (out), or remove {out} to train anew."
        ) from error
    if not (student or saved):
        return None  # a run that ended before it had anything to lose
    if other := differences({"config": _binding(theirs)}, {"config": _binding(config.to_dict())}):
        raise ValueError(_refusal(out, other))
    if not resume:
        what = (
            "a finished student" if finished else f"an unfinished run, saved up to step {saved[-1][0] if saved else 0},"
        )
        raise ValueError(
            f"{out} holds {what} of this configuration already; resume=True (--resume) goes on with it. To train anew, "
            "choose another folder (out), or remove that one."
        )
    return found if finished else None


def _refusal(out: Path, other: dict[str, tuple]) -> str:
    lines = "\n".join(f"  {key}: {theirs} there, {ours} here" for key, (theirs, ours) in other.items())
    return (
        f"{out} belongs to another run:\n{lines}\n"
        "Choose another folder (out), remove that one, or resume with what it was started with."
    )


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration a run's numbers follow from: all but the folder and how often it logs,
    evaluates and saves.
    """
    aside = ("log_every", "eval_every", "save_every")
    config = by_names(config, OLD_NAMES)
    training = {key: value for key, value in config["training"].items() if key not in aside}
    return {key: value for key, value in config.items() if key != "out"} | {"training": training}


def _checkpoint(folder: Path, processes: int) -> Path | None:
    """Where a broken run goes on; None: at its start, with a warning where checkpoints were begun and none was
    finished.

    Raises:
        ValueError: there were finished checkpoints and none is whole:
            starting over would cost what may yet be restored.
    """
    found = last_whole_checkpoint(folder, processes)
    if found is None and (all_ := checkpoints(folder)):
        if lost := [path for _, path in all_ if was_finished(path)]:
            reasons = "; ".join(f"{path.name}: {flaw(path)}" for path in lost)
            raise ValueError(
                f"{folder} holds no whole checkpoint to go on from ({reasons}). Restore one, or remove the folder to "
                "train from the start."
            )
        logger.warning("%s holds no finished checkpoint: the run starts at step 0.", folder)
    return found


# -- before the first step --------------------------------------------------------------------------------------------


def _rehearse(student, prepared: Prepared, device) -> None:
    """Evaluate the student on a few rows as it will be evaluated: what does not fit is said before training.
    Draws no random numbers.
    """
    from fakit.models.random_state import random_state_kept

    task, tokenizer = prepared.task, prepared.tokenizer
    with random_state_kept(device):
        for split, teacher in ((prepared.validation, None), (prepared.test, prepared.teacher)):
            _evaluate(student, _few(split, 2 if task.kind == "causal-lm" else 16), task, tokenizer, teacher)


def _few(split, rows: int):
    """The rows with the most labels among the first thousand."""
    labels = split[:1000]["labels"]
    counts = [sum(x != -100 for x in row) if isinstance(row, list) else int(row != -100) for row in labels]
    chosen = sorted(range(len(labels)), key=lambda i: -counts[i])[:rows]
    return split.select(sorted(chosen))


def _steps_a_pass(rows: TrainingRows, args) -> int:
    """Steps in which each labeled text comes about once."""
    batches = args.gradient_accumulation_steps * args.world_size
    labeled = int((rows.plan[:batches] < rows.labeled).sum())
    return max(1, round(rows.labeled / labeled))


def prepare_run(config: ExperimentConfig) -> Prepared:
    """`prepare` on the device that the run is going to train on."""
    device = build_arguments(config, tempfile.gettempdir()).device
    with without_side_bars():
        return prepare(config, device)


def evaluate_baselines(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Records, to stand beside the runs of a configuration, of what is there without any training of a student.

    "teacher"; "untrained", the student as it starts; and for text to text "copy", the input left as it is.
    """
    from transformers import set_seed

    set_seed(config.seed)
    prepared = prepare_run(config)
    task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
    splits = {"validation": prepared.validation, "test": prepared.test}
    set_seed(config.seed)
    with without_side_bars():
        student = build_student(config, teacher, task)
    scores = {"teacher": {name: _evaluate(teacher, split, task, tokenizer) for name, split in splits.items()}}
    copied = f"{task.metric}_copy"
    if copied in scores["teacher"]["test"]:
        scores["copy"] = {name: {task.metric: scores["teacher"][name][copied]} for name in splits}
    scores["untrained"] = {n: _evaluate(student, split, task, tokenizer, teacher) for n, split in splits.items()}
    parameters = {"teacher": _parameters(teacher), "untrained": _parameters(student)}
    return [
        {
            "run_id": baseline_id(config, arm),
            "kind": "baseline",
            "task": task.name,
            "arm": arm,
            "seed": config.seed,
            "metric": task.metric,
            "score": of_arm["test"][task.metric],
            "higher_is_better": task.metric not in LOWER_IS_BETTER,
            **of_arm,
            "parameters": parameters.get(arm),
            "config": config.to_dict(),
            "finished": now(),
            "versions": versions(),
            "data": prepared.fingerprint(),
        }
        for arm, of_arm in scores.items()
    ]


def baseline_id(config: ExperimentConfig, arm: str) -> str:
    """The run id of a baseline beside `config`: whatever its terms and training, so it is evaluated once."""
    bare = config.replace(
        features=None,
        attention=None,
        outputs=None,
        task_weight=1.0,
        balancing=None,
        training_args={},
        name=f"baseline {arm}",
    )
    return bare.replace(training={"max_length": config.training.max_length}).run_id


def step_flops(trainer: DistillationTrainer, rows: TrainingRows, batches: int = 4) -> float | None:
    """FLOPs of one optimizer step, forward and backward, teacher included: the mean over typical batches, and over the
    steps where a schedule switches terms on and off.

    The teacher's forward ends where the objective needs no more of it, and this counts what is done. None for a
    quantized teacher, and under balancing by gradient norms, of which some steps cost more. Random numbers drawn here
    (dropout) do not count, and what an objective learns from a batch by itself (`EarthMover`'s masses) is put back: the
    run goes on as if nothing was measured.
    """
    from fakit.evaluation.cost import count_flops
    from fakit.models.load import is_quantized
    from fakit.models.random_state import random_state_kept
    from fakit.objective.balancing import GradientNorm

    if is_quantized(trainer.teacher) or isinstance(trainer.objective.balancing, GradientNorm):
        return None
    distiller, device = trainer.model, trainer.args.device
    distiller.to(device)
    trainer.standardize_as_asked()
    objective, steps = trainer.objective, trainer.args.max_steps
    # the steps with the same terms on cost the same, and the first of them stands for all
    on: dict[tuple[str, ...], list[int]] = {}
    for step in range(steps if objective.weights.schedules else 1):
        objective.set_step(step, of=steps)
        on.setdefault(tuple(filter(objective.active, objective.terms)), []).append(step)
    was_training = distiller.training
    trainable = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    counts = []
    with random_state_kept(device), objective.buffers_kept():
        distiller.train()
        for examples in rows.typical_batches(batches):
            batch = {name: value.to(device) for name, value in trainer.data_collator(examples).items()}

            def step(batch=batch):
                torch.autograd.grad(distiller(**batch)["loss"], trainable, allow_unused=True)

            for alike in on.values():
                objective.set_step(alike[0], of=steps)
                counts.append(count_flops(step) * len(alike))
        distiller.train(was_training)
    objective.set_step(0, of=steps)
    per_batch = sum(counts) / batches / sum(map(len, on.values()))
    return per_batch * trainer.args.gradient_accumulation_steps * trainer.args.world_size


@contextmanager
def without_side_bars():
    """No progress bars of loading, tokenizing and writing, which take moments here and would run through the run's
    own.
    """
    import datasets
    from transformers.utils import logging

    were_on = datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on[0]:
            datasets.enable_progress_bars()
        if were_on[1]:
            logging.enable_progress_bar()


def now() -> str:
    """The time of a record: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _evaluate(model, dataset, task, tokenizer, teacher=None) -> dict[str, float]:
    from fakit.evaluation import evaluate

    scores = evaluate(model, dataset, task.collator(tokenizer), task, tokenizer=tokenizer, teacher=teacher)
    if task.metric not in scores:
        raise ValueError(f"the headline metric of {task.name} is {task.metric}; evaluate gave {', '.join(scores)}.")
    return scores


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One entry a logged step, evaluations at that step included; their timings are no result."""
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    by_step: dict[int, dict[str, float]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            kept = {name: value for name, value in entry.items() if name not in ("step", *timings)}
            by_step.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return list(by_step.values())


def _parameters(model) -> int:
    from fakit.evaluation.cost import count_parameters

    return count_parameters(model)["parameters"]
