"""`run_experiment`: one configuration from data to numbers; what `fakit distill` and the notebooks call."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fakit.compression import low_rank
from fakit.experiments.build import (
    Prepared,
    TrainingRows,
    build_arguments,
    build_objective,
    build_training_rows,
    check_lengths,
    prepare,
    student_tokenizer,
)
from fakit.experiments.cache_config import TeacherCacheConfig, cache_of
from fakit.experiments.card import model_card
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.facts import facts_of_texts, made_on, scores_of_teacher, softness
from fakit.experiments.flops import step_flops
from fakit.experiments.quiet import without_side_bars
from fakit.experiments.result import RunResult
from fakit.experiments.run_folder import RUN, alone_in_folder, binding, checkpoint_of, finished_student, refusal
from fakit.experiments.scores import parameters_of, scores_of
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import RunStore, now, strict_json
from fakit.experiments.students import exported, make_student
from fakit.files import check_room, write_whole
from fakit.models.blocks import depth, without_adapter
from fakit.models.low_rank_linear import pairs
from fakit.models.random_state import random_state_kept
from fakit.training.checkpoints import (
    began_in_bf16,
    differences,
    versions,
)
from fakit.training.precision import AUTO

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from fakit.training.teacher_cache import PlannedCache, TeacherCache

COMPRESSED = "compressed"  # where the folder of a run holds what is finished of a compression before it


def run_experiment(
    config: ExperimentConfig,
    store: RunStore | str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    progress: bool = True,
    prepared: Prepared | None = None,
    count_flops: bool = True,
    teacher_cache: str | Path | None = None,
    cache_dtype: str | None = None,
    cache_top_k: int | None = None,
    cache_rows: str | None = None,
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
        cache_dtype, cache_top_k, cache_rows: how, as `config.teacher_cache` has it under the same names; what is given
            here goes before that.

    Raises:
        ValueError: before any training, for parts that do not fit, a run that is recorded while `resume` is off, a
            folder that holds another run's or a finished student, that another run writes to at this moment,
            or that has no room.
    """
    given = {"folder": teacher_cache, "dtype": cache_dtype, "top_k": cache_top_k, "rows": cache_rows}
    given["folder"] = None if teacher_cache is None else str(teacher_cache)
    cache_of(config.teacher_cache, **given)  # wrong values are wrong for a recorded run, too
    store = RunStore.open(store) if isinstance(store, str | Path) else store
    if store is not None and store.has(config.run_id):
        if resume:
            return RunResult.from_store(store, config.run_id)
        raise ValueError(
            f"{config.run_id} is recorded in {store.path} already. resume=True (--resume) returns it; "
            "change the seed or another key for a new run."
        )
    asked = asked_cache(config, **given)
    with alone_in_folder(config, store):
        return _run(config, store, resume, callbacks, progress, prepared, count_flops, asked)


def _run(config, store, resume, callbacks, progress, prepared, count_flops, asked) -> RunResult:
    """`run_experiment`, alone in its folder."""
    from transformers import PrinterCallback

    from fakit.tasks.packing import documents
    from fakit.training.ownership import bytes_of_checkpoint, data_fingerprint
    from fakit.training.packed import check_packed
    from fakit.training.progress import ProgressBar
    from fakit.training.trainer import DistillationTrainer

    out = None if config.out is None else Path(config.out)
    finished = None if out is None else finished_student(config, out, resume)
    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(out / "checkpoints")
    with without_side_bars(), folder as folder:
        args = build_arguments(config, folder)
        checkpoint = checkpoint_of(Path(folder), args.world_size) if resume and finished is None else None
        if checkpoint is not None and config.training.bf16 == AUTO:
            began = began_in_bf16(checkpoint)
            args.bf16 = args.bf16 if began is None else began
        work = None if out is None else out / COMPRESSED
        prepared, made, rows, objective = parts_of(config, args, prepared, work, resume, asked is not None)
        task, teacher, tokenizer, student = prepared.task, prepared.teacher, prepared.tokenizer, made.model
        teachers = prepared.teacher_tokenizer
        _rehearse(student, prepared, args.device)
        if teachers is None:
            _look_for_massive(objective, student, teacher, rows, task.collator(tokenizer))
        facts = {"versions": versions(), "data": data_fingerprint(rows.rows)}
        if finished is not None and (other := differences({key: finished[key] for key in facts}, facts)):
            raise ValueError(refusal(out, other))
        if out is not None:
            check_room(out, bytes_of_checkpoint(student, objective, "none"), "the student")
        cache, collator = None, prepared.collator()
        if asked is not None:
            # the trainer, which asks the same, is made when the teacher has been read
            check_packed(rows.rows, collator, objective, student.to(args.device), teacher, args)
            cache = asked.build(teacher, rows.rows, rows.plan, objective, tokenizer)
        trainer = DistillationTrainer(
            teacher,
            student,
            objective,
            args=args,
            teacher_cache=cache,
            train_dataset=rows.dataset(),
            eval_dataset=prepared.validation,
            data_collator=collator,
            on_policy=config.on_policy and config.on_policy.build(tokenizer, student),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # what stands in for a progress bar that was switched off
        bar = ProgressBar(objective.weights)
        if progress:
            trainer.add_callback(bar)
        trainer.bound_to = {"config": binding(config.to_dict())}
        if objective.layer_map.is_random:
            trainer.epochs.steps = _steps_a_pass(rows, args)
        main = trainer.is_world_process_zero()
        if finished is None:
            # of a compression nobody counted them, nor of what a student writes
            counted = count_flops and cache is None and not made.facts and trainer.rollouts is None
            flops_per_step = step_flops(trainer, rows) if counted else None
            begun = {"run_id": config.run_id, "config": config.to_dict(), **facts, "finished": None}
            if out is not None and main:
                write_whole(out / RUN, json.dumps(begun, indent=1, allow_nan=False))
            with closing(bar):
                trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            student = exported(trainer.whole_student(), keep=False)
            done = {
                "steps": trainer.state.global_step,
                "seconds": trained.metrics["train_runtime"],
                "flops_per_step": flops_per_step,
                "flops": None if flops_per_step is None else flops_per_step * trainer.state.global_step,
                "teacher_cache": None if cache is None else cache.content.precision,
                "precision": trainer.precision,
                "on_policy": trainer.written(),
                "history": _history(trainer.state.log_history),
            }
            if out is not None and main:  # before anything else that may fail
                _save(student, out, tokenizer)
                config.to_yaml(out / "experiment.yaml")
                write_whole(out / RUN, json.dumps(strict_json({**begun, "finished": done}), indent=1, allow_nan=False))
        else:
            done = finished["finished"]
            done["history"] = [{k: v for k, v in row.items() if v is not None} for row in done["history"]]
            student = _load(without_adapter(student), out).to(args.device)

    scores = scores_of(student, prepared.test, task, tokenizer, prepared.reference())
    labeled = documents(rows.rows.select(range(rows.labeled)))
    result = RunResult(
        run_id=config.run_id,
        task=task.name,
        arm=config.arm,
        seed=config.seed,
        metric=task.metric,
        score=scores[task.metric],
        higher_is_better=task.metric not in LOWER_IS_BETTER,
        validation=scores_of(student, prepared.validation, task, tokenizer),
        test=scores,
        parameters=parameters_of(student),
        teacher_parameters=parameters_of(teacher),
        labeled=labeled,
        unlabeled=documents(rows.rows) - labeled,
        config=config.to_dict(),
        finished=now(),
        versions=versions(),
        data=prepared.fingerprint(),
        dropped=task.dropped,
        compression=made.facts or None,
        teacher=scores_of_teacher(prepared),
        softness=softness(prepared, objective, done["history"]),
        texts=facts_of_texts(task, rows),
        layers={"student": depth(student), "teacher": depth(teacher)},
        made_on=made_on(),
        student=student,
        **done,
    )
    if main and out is not None:
        write_whole(out / "README.md", model_card(config, result, task, bool(pairs(student))))
    if main and store is not None:
        store.append_steps(config.run_id, result.history)
        store.append_run(result.record())
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return result


def parts_of(config, args, prepared: Prepared | None, work: Path | None, resume: bool, cached: bool):
    """What a run stands on: (`Prepared`, the student as made, training rows, objective), after what is refused of them.

    Args:
        prepared, resume: as of `run_experiment`. work: where a compression leaves what it has finished.
        cached: a cache stands for the teacher.
    """
    from transformers import set_seed

    from fakit.tracing.inputs import refuse_mixing
    from fakit.training.fit import check_fit, check_two_tokenizers

    set_seed(config.seed)
    prepared = prepared or prepare(config, args.device)
    prepared.check(config)
    task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
    teachers = prepared.teacher_tokenizer
    if task.packing:
        refuse_mixing(teacher, config.training.batch_size)
    set_seed(config.seed)  # the student's first weights depend on the seed alone, not on what loading drew
    made = make_student(config, prepared, work, resume)
    objective = build_objective(config, made.model, teacher, made.kept)
    check_fit(teacher, made.model, objective, teachers or tokenizer, student_tokenizer(config))
    if teachers is not None:
        check_two_tokenizers(objective, cached, config.on_policy is not None)
    rows = build_training_rows(config, task, tokenizer, args.world_size, teachers)
    both = ({"teacher": teacher} if teachers is None else {}) | {"student": made.model}
    for split in (rows.rows, prepared.validation, prepared.test):
        check_lengths(split, config.training.max_length, **both)
    if teachers is not None:
        check_lengths(rows.rows, config.training.max_length, "teacher_input_ids", teacher=teacher)
    return prepared, made, rows, objective


def asked_cache(config: ExperimentConfig, **given) -> TeacherCacheConfig | None:
    """The cache that a configuration, or what is given beside it (`cache_of`), asks for.

    Raises:
        ValueError: one that the configuration has no use for.
    """
    asked = cache_of(config.teacher_cache, **given)
    if asked is not None and not config.transfers:
        raise ValueError(
            f"a teacher cache was asked for in {asked.folder}, and the arm {config.arm!r} has no term that looks at a "
            "teacher (features, attention, outputs): leave the cache out, or turn one on."
        )
    if asked is not None and config.on_policy is not None:
        raise ValueError(
            f"a teacher cache was asked for in {asked.folder}, and on_policy has the student write texts that are in "
            "none: leave the cache out, or set on_policy: null."
        )
    return asked


def cache_experiment(config: ExperimentConfig, plan: bool = False, **given) -> TeacherCache | PlannedCache:
    """Build the teacher cache of a configuration without training, with what a run would check before it; a run of it
    then opens it. What is finished of it stays.

    Args:
        plan: build nothing, and say what it would take.
        given: folder, dtype, top_k and rows, as `TeacherCacheConfig` has them; what is given goes before it.

    Raises:
        ValueError: no cache that is asked for, or what `run_experiment` refuses.
    """
    from fakit.training.packed import check_packed

    asked = asked_cache(config, **given)
    if asked is None:
        raise ValueError(
            "the configuration names no teacher cache: teacher_cache: {folder: …} in it, or --teacher-cache DIR."
        )
    with without_side_bars(), tempfile.TemporaryDirectory() as folder:
        args = build_arguments(config, folder)
        prepared, made, rows, objective = parts_of(config, args, None, None, False, cached=True)
        check_packed(rows.rows, prepared.collator(), objective, made.model.to(args.device), prepared.teacher, args)
        build = asked.plan if plan else asked.build
        return build(prepared.teacher, rows.rows, rows.plan, objective, prepared.tokenizer)


def _save(student, out: Path, tokenizer) -> None:
    if pairs(student):
        low_rank.save(student, out, tokenizer)
        return
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _load(student, out: Path):
    if pairs(student):
        return low_rank.load(out)
    return type(student).from_pretrained(out, dtype=torch.float32, trust_remote_code=False)


# -- before the first step --------------------------------------------------------------------------------------------


def _rehearse(student, prepared: Prepared, device) -> None:
    """Evaluate the student on a few rows as it will be evaluated: what does not fit is said before training.
    Draws no random numbers.
    """
    from fakit.evaluation.evaluator import written_metrics
    from fakit.evaluation.generation import SCORED, check_prompts_fit

    task, tokenizer = prepared.task, prepared.tokenizer
    if written_metrics(task):
        for name, split in (("validation", prepared.validation), ("test", prepared.test)):
            check_prompts_fit(student, split.select(range(min(SCORED, len(split)))).to_list(), f"the {name} split")
    with random_state_kept(device):
        reference = prepared.teacher if prepared.teacher_tokenizer is None else None
        for split, beside in ((prepared.validation, None), (prepared.test, reference)):
            scores_of(student, _few(split, 2 if task.kind == "causal-lm" else 16), task, tokenizer, beside)


def _look_for_massive(objective, student, teacher, rows: TrainingRows, collator) -> None:
    from fakit.training.massive import warn_of_massive

    if teacher is not None and objective.needs_teacher():
        device = next(teacher.parameters()).device
        batch = collator(rows.rows.select(range(min(2, len(rows.rows)))).to_list())
        with random_state_kept(device):
            warn_of_massive(objective, student, teacher, {name: x.to(device) for name, x in batch.items()})


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


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One entry a logged step, evaluations at that step included; their timings are no result."""
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "on_policy/tokens_per_second")
    by_step: dict[int, dict[str, float]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            kept = {name: value for name, value in entry.items() if name not in ("step", *timings)}
            by_step.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return list(by_step.values())
