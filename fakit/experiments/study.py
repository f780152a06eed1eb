"""A study: the same student under different objectives, with paired seeds, on one or more tasks; stopped and continued.

`run_study` runs what the store does not hold yet. A run is stored when it is finished, so a stop costs the runs under
way and nothing else; the same command continues.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fakit.experiments.config import ARMS, ExperimentConfig
from fakit.experiments.run import RunResult, baseline_id, evaluate_baselines, run_experiment
from fakit.experiments.schema import Section, describe, did_you_mean, from_file
from fakit.experiments.store import RunStore
from fakit.training.distributed import end_with_parent

EQUAL_COMPUTE = "{arm}, equal compute"
REFERENCE = "all"  # whose compute the equal-compute arms are given


class Experiments(Section):
    """A configuration with a key `experiments`: in a file, mappings or names of YAML files beside it."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | Path = ".") -> Self:
        """Build from a mapping; names of YAML files in `experiments` are relative to `folder`."""
        if isinstance(data, Mapping) and isinstance(data.get("experiments"), list | tuple):
            experiments = [_experiment(n, item, Path(folder)) for n, item in enumerate(data["experiments"])]
            data = {**data, "experiments": experiments}
        return super().from_dict(data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file, and the files of experiments that it names."""
        return from_file(path, lambda data: cls.from_dict(data, Path(path).parent))


@dataclass(frozen=True)
class StudyConfig(Experiments):
    """Experiments × arms × seeds.

    Attributes:
        experiments: one for each task, with all the terms that the arms switch off; in a file, mappings or names of
            YAML files beside it.
        arms: of none, outputs, features, attention, all.
        seeds: each runs every arm from the same student and labeled texts; intervals are over these.
        equal_compute: arms that run once more, with as many steps as give them the training FLOPs of "all", the
            teacher's forward passes included.
        baselines: also record, with the first seed, the teacher, the untrained student and, where it means something,
            the copied input.
    """

    experiments: tuple[ExperimentConfig, ...]
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    equal_compute: tuple[str, ...] = ("none",)
    baselines: bool = True
    what: str = field(default="what feature alignment buys: arms with paired seeds")

    def _check(self) -> None:
        if not self.arms:
            raise ValueError("arms: found none; a study needs at least one.")
        for key, values in (("arms", self.arms), ("equal_compute", self.equal_compute)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {list(values)}, in which one comes twice.")
        check_pairing(self.experiments, self.seeds)
        for arm in (*self.arms, *self.equal_compute):
            if arm not in ARMS:
                raise ValueError(f"arms: {arm!r} is not one of {', '.join(ARMS)}.{did_you_mean(arm, ARMS)}")
            for experiment in self.experiments:
                experiment.with_arm(arm)  # raises where a term is missing
        if self.equal_compute and not {REFERENCE, *self.equal_compute} <= set(self.arms):
            raise ValueError(
                f"equal_compute: {', '.join(self.equal_compute)} at the compute of {REFERENCE!r} needs these among the "
                f"arms, which are {', '.join(self.arms)}."
            )

    def runs(self, seeds: tuple[int, ...] | None = None) -> list[ExperimentConfig]:
        """The runs at equal steps, seed by seed, so that a study that was stopped early compares whole tasks."""
        return [
            experiment.with_arm(arm).replace(seed=seed)
            for seed in (self.seeds if seeds is None else seeds)
            for experiment in self.experiments
            for arm in self.arms
        ]

    def equal_compute_runs(self, store: RunStore) -> list[ExperimentConfig]:
        """The equal-compute runs, whose steps follow from what the first seed's runs were measured to cost.

        Raises:
            ValueError: when those runs are not recorded, or have no FLOPs (a quantized teacher).
        """
        first = self.seeds[0]
        configs = []
        for experiment in self.experiments if self.equal_compute else ():
            target = store.record(experiment.with_arm(REFERENCE).replace(seed=first).run_id)
            for arm in self.equal_compute:
                config = experiment.with_arm(arm)
                own = store.record(config.replace(seed=first).run_id)
                steps = equal_compute_steps(own, target)
                name = EQUAL_COMPUTE.format(arm=arm)
                configs += [config.replace(seed=s, name=name, **{"training.steps": steps}) for s in self.seeds]
        return sorted(configs, key=lambda config: self.seeds.index(config.seed))


def check_pairing(experiments: tuple[ExperimentConfig, ...], seeds: tuple[int, ...]) -> None:
    """Raise ValueError unless there are experiments, one a task, and seeds, each once: what pairing needs."""
    for key, values in (("experiments", experiments), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{key}: found none; a study needs at least one.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: found {list(seeds)}, in which one comes twice.")
    tasks = [experiment.task.name for experiment in experiments]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"experiments: found {', '.join(tasks)}; one for each task, so that its runs can be paired.")


def equal_compute_steps(own: Mapping[str, Any], target: Mapping[str, Any]) -> int:
    """Steps after which a run has cost the FLOPs that another run cost in all; both are records of a store."""
    for record in (own, target):
        if not record["flops_per_step"]:
            raise ValueError(
                f"{record['run_id']} has no FLOPs per step (a quantized teacher cannot be counted), so equal compute "
                "cannot be planned; study an unquantized teacher, or set equal_compute: []."
            )
    return max(1, round(target["flops"] / own["flops_per_step"]))


def run_study(study: StudyConfig, out: str | Path, workers: int = 1, progress: bool = True) -> RunStore:
    """Run what is not recorded in `out` yet; one line of progress a run.

    Args:
        out: the runs directory, made when missing.
        workers: processes side by side, each with one thread.
        progress: print the lines.

    Returns:
        The store, complete. An exception of a run (noted with its run id) ends the study; what finished is recorded.
    """
    check_workers(workers)
    store = RunStore.open(out, what=study.what)
    say = print if progress else silent
    if study.baselines:
        for experiment in study.experiments:
            _record_baselines(experiment.replace(seed=study.seeds[0]), store, say)
    run_missing(study.runs(), store, workers, say)
    run_missing(study.equal_compute_runs(store), store, workers, say)
    return store


def check_workers(workers: int) -> None:
    """Raise ValueError unless there is at least one; before any work."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers: found {workers!r}, expected a whole number of processes, at least 1.")


def _record_baselines(config: ExperimentConfig, store: RunStore, say) -> None:
    if store.has(baseline_id(config, "untrained")):  # the last to be written
        return
    for record in evaluate_baselines(config):
        if not store.has(record["run_id"]):
            store.append_run(record)
            say(f"{record['task']}, {record['arm']}: test {record['metric']} {record['score']:.4f}", flush=True)


def run_missing(
    configs: list[ExperimentConfig],
    store: RunStore,
    workers: int,
    say: Callable[..., None],
    run: Callable[[ExperimentConfig, Path], RunResult] | None = None,
) -> None:
    """Run what the store does not hold; `run` (by default `run_experiment`) trains one and records it,
    and is a module's function.
    """
    done = {record["run_id"] for record in store.records()}
    missing = [config for config in configs if config.run_id not in done]
    if len(missing) < len(configs):
        say(f"{len(configs) - len(missing)} of {len(configs)} runs are recorded in {store.path}; {len(missing)} to go.")
    start = time.monotonic()
    for number, result in enumerate(_results(missing, store, workers, run or run_recorded), start=1):
        left = (time.monotonic() - start) / number * (len(missing) - number)
        say(f"[{number}/{len(missing)}] {result} · about {left / 60:.0f} min left", flush=True)


def _results(configs: list[ExperimentConfig], store: RunStore, workers: int, run: Callable) -> Iterator[RunResult]:
    """Run and record each, in this process or in several; results as they come."""
    if workers == 1:
        for config in configs:
            yield run(config, store.path)
        return
    spawn = multiprocessing.get_context("spawn")  # forked children would share torch's thread pools
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
        futures = [pool.submit(run, config, store.path) for config in configs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_recorded(config: ExperimentConfig, path: Path, **options: Any) -> RunResult:
    """`run_experiment` without its bar; an error says which run it was, and the result leaves its model behind."""
    try:
        result = run_experiment(config, path, progress=False, **options)
    except Exception as error:
        error.add_note(f"in the run {config.run_id}, task {config.task.name}, arm {config.arm}, seed {config.seed}")
        raise
    result.student = None  # a model a run would fill the memory
    return result


def _start_worker() -> None:
    import torch

    end_with_parent()
    torch.set_num_threads(1)


def silent(*_args, **_kwargs) -> None:
    """A study without progress lines."""


def _experiment(number: int, item: Any, folder: Path) -> ExperimentConfig:
    if isinstance(item, ExperimentConfig):
        return item
    if isinstance(item, str):
        return ExperimentConfig.from_yaml(folder / item)
    if not isinstance(item, Mapping):
        raise ValueError(f"experiments: found {describe(item)}, expected a mapping or the name of a YAML file.")
    try:
        return ExperimentConfig.from_dict(item)
    except ValueError as error:
        raise ValueError(f"experiments[{number}].{error}") from error
