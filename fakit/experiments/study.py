"""A study: the same student in several ways, with paired seeds, on one or more tasks; stopped and continued.

`Study.run` runs what the store does not hold yet. A run is stored when it is finished, so a stop costs the runs under
way and nothing else; the same command continues.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field

from fakit import warn_of_old_name
from fakit.experiments.baselines import baseline_id, evaluate_baselines, prepare_run
from fakit.experiments.build import Prepared, shared
from fakit.experiments.cells import factor_of
from fakit.experiments.config import ARMS, ExperimentConfig
from fakit.experiments.map_study import SIMILARITY, record_similarity
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.schema import Section, Truth, Whole, describe, from_file
from fakit.experiments.store import RunStore
from fakit.experiments.vary import Change, read_vary
from fakit.training.distributed import end_with_parent

EQUAL_COMPUTE = "{arm}, equal compute"


def _several(base: Any) -> Any:
    return (base,) if isinstance(base, ExperimentConfig) else base


class Study(Section):
    """Experiments × what is varied × seeds. All runs of a task and seed start from the same student and see the same
    texts in the same order, so they may be compared in pairs.

    Args:
        base: an experiment, or several, one a task. In a file, mappings or names of YAML files beside it.
        vary: name of an arm → its changes, as `ExperimentConfig.replace` takes them, or a function (config, seed) →
            configuration or changes. `arms`, `maps` and `weights` make such mappings; a file names them by their kind:
            `vary: {kind: maps, student_layers: 3, teacher_layers: 6}`.
        seeds: each runs every arm; intervals are over these.
        equal_compute: arms that run once more, with as many steps as give them the training FLOPs of the arm that costs
            most, the teacher's forward passes included.
        baselines: also record, with the first seed, the teacher, the untrained student and, where it means something,
            the copied input.
        similarity_texts: of a study of maps: on so many unlabeled texts the layers of the untrained student and the
            teacher are compared, for `map_scores`.
        against: of a grid: the level, as "outputs", that `report` compares the others of its factor with in every cell
            of the other factors, corrected for the number of comparisons (`fakit.experiments.cells`).
        count_flops: count a step's FLOPs in each run, which costs the time of some steps.
        what: what the study asks, as its report is headed.

    Raises:
        ValueError: an arm that cannot be made of an experiment, or that changes what runs are paired by.

    >>> study = Study(ExperimentConfig(), vary={"as it is": {}, "low": {"features.weight": 0.1}}, seeds=range(5))
    >>> print(study)
    1 task × 2 arms × 5 seeds = 10 runs
    >>> [(run.arm, run.features.weight, run.seed) for run in study.runs()][:3]
    [('as it is', 1.0, 0), ('low', 0.1, 0), ('as it is', 1.0, 1)]
    """

    old_names: ClassVar[dict[str, str]] = {"experiments": "base"}
    base: Annotated[tuple[ExperimentConfig, ...], BeforeValidator(_several)]
    vary: Annotated[dict[str, Any], BeforeValidator(read_vary)]
    seeds: tuple[Whole, ...] = (0, 1, 2)
    equal_compute: tuple[str, ...] = ()
    baselines: Truth = True
    similarity_texts: Annotated[Whole, Field(ge=8)] | None = None
    against: str | None = None
    count_flops: Truth = True
    what: str = "arms with paired seeds"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | Path = ".") -> Self:
        """Build from a mapping; names of YAML files in `base` are relative to `folder`."""
        if isinstance(data, Mapping):
            data = _by_current_keys(cls._by_current_names(data))
            base = data.get("base")
            base = [base] if isinstance(base, str | Mapping) else base
            if isinstance(base, list | tuple):
                data["base"] = [_experiment(n, item, Path(folder)) for n, item in enumerate(base)]
        return super().from_dict(data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file, and the files of experiments that it names."""
        return from_file(path, lambda data: cls.from_dict(data, Path(path).parent))

    def to_dict(self) -> dict[str, Any]:
        """As `Section.to_dict`. Raises ValueError where a change is a function, which no file can hold."""
        if functions := [name for name, change in self.vary.items() if callable(change)]:
            raise ValueError(f"vary.{functions[0]}: is a function, which no file can hold.")
        return super().to_dict()

    def _check(self) -> None:
        for key, values in (("base", self.base), ("vary", self.vary), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{key}: found none; a study needs at least one.")
        for key, values in (("seeds", self.seeds), ("equal_compute", self.equal_compute)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {list(values)}, in which one comes twice.")
        tasks = [experiment.task.name for experiment in self.base]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"base: found {', '.join(tasks)}; one for each task, so that its runs can be paired.")
        self.runs()  # raises where an arm cannot be made
        if self.against is not None:
            factor_of(self.against, self.vary)  # raises where it is in none
        if unknown := [arm for arm in self.equal_compute if arm not in self.vary]:
            raise ValueError(f"equal_compute: {unknown[0]!r} is not among the arms, which are {', '.join(self.vary)}.")
        if self.equal_compute and len(self.vary) < 2:
            raise ValueError(f"equal_compute: {self.equal_compute[0]!r} is the only arm, so no other costs more.")
        if self.equal_compute and (made := [run.arm for run in self.runs() if run.student.compression]):
            raise ValueError(
                f"equal_compute: needs the FLOPs of all runs, and nobody counts those of the compression before "
                f"{made[0]!r}; leave one of the two out."
            )
        if self.equal_compute and not self.count_flops:
            raise ValueError("equal_compute: needs the FLOPs of the runs, and count_flops is false.")

    def __str__(self) -> str:
        sizes = {"task": len(self.base), "arm": len(self.vary), "seed": len(self.seeds)}
        counted = " × ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in sizes.items())
        again = len(self.base) * len(self.equal_compute) * len(self.seeds)
        return f"{counted} = {math.prod(sizes.values())} runs{f', and {again} at equal compute' if again else ''}"

    def _repr_markdown_(self) -> str:
        tasks = ", ".join(experiment.task.name for experiment in self.base)
        return f"**{self.what}**: {self}. Tasks: {tasks}. Arms: {', '.join(self.vary)}."

    def runs(self) -> list[ExperimentConfig]:
        """The runs at equal steps, seed by seed, so that a study that was stopped early compares whole tasks. Within
        those, runs of the same data come together, which load them once.
        """
        found = []
        for seed in self.seeds:
            for experiment in self.base:
                of_data: dict[str, list[ExperimentConfig]] = {}
                for arm in self.vary:
                    run = self._varied(experiment, arm, seed)
                    of_data.setdefault(repr(shared(run)), []).append(run)
                found += [run for runs in of_data.values() for run in runs]
        return found

    def equal_compute_runs(self, store: RunStore) -> list[ExperimentConfig]:
        """The equal-compute runs, whose steps follow from what the first seed's runs were measured to cost.

        Raises:
            ValueError: when those runs are not recorded, or have no FLOPs (a quantized teacher).
        """
        first = self.seeds[0]
        configs = []
        for experiment in self.base if self.equal_compute else ():
            costs = {arm: store.record(self._varied(experiment, arm, first).run_id) for arm in self.vary}
            dearest = max(costs.values(), key=lambda record: record["flops"] or math.inf)
            for arm in self.equal_compute:
                changes = {
                    "name": EQUAL_COMPUTE.format(arm=arm),
                    "training.steps": equal_compute_steps(costs[arm], dearest),
                }
                configs += [self._varied(experiment, arm, seed).replace(**changes) for seed in self.seeds]
        return sorted(configs, key=lambda config: self.seeds.index(config.seed))

    def run(self, out: str | Path, workers: int = 1, progress: bool = True) -> RunStore:
        """Run what is not recorded in `out` yet; one line of progress a run.

        Args:
            out: the runs directory, made when missing.
            workers: processes side by side, each with one thread.
            progress: print the lines.

        Returns:
            The store, complete. An exception of a run (noted with its run id) ends the study; what finished is
            recorded.
        """
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers: found {workers!r}, expected a whole number of processes, at least 1.")
        store = RunStore.open(out, what=self.what, arms=list(self.vary), against=self.against)
        say = print if progress else _silent
        runs, first = self.runs(), [experiment.replace(seed=self.seeds[0]) for experiment in self.base]
        if self.baselines:
            for config in first:
                _record_baselines(config, store, say)
        if self.similarity_texts and (_missing(runs, store) or not (store.path / SIMILARITY).is_file()):
            record_similarity(first, self.similarity_texts, self.vary, store.path)
        _run_missing(runs, store, workers, say, self.count_flops)
        if self.equal_compute:
            _run_missing(self.equal_compute_runs(store), store, workers, say, self.count_flops)
        return store

    def _varied(self, experiment: ExperimentConfig, arm: str, seed: int) -> ExperimentConfig:
        """The run of an arm and seed; named as the arm, unless its terms give it that name anyway, as "all"."""
        change: Change = self.vary[arm]
        config = experiment.replace(seed=seed)
        try:
            made = change(config, seed) if callable(change) else change
            if isinstance(made, Mapping):
                made = config.replace(**{str(key): value for key, value in made.items()})
            if not isinstance(made, ExperimentConfig):
                raise ValueError(f"found {describe(made)}, expected changes such as {{features.weight: 0.1}}.")
            made = made if made.arm == arm else made.replace(name=arm)
        except ValueError as error:
            raise ValueError(f"vary.{arm}: {error}") from error
        for key, ours, theirs in (("task.name", experiment.task.name, made.task.name), ("seed", seed, made.seed)):
            if ours != theirs:
                raise ValueError(
                    f"vary.{arm}: changes {key} from {ours!r} to {theirs!r}, and runs are paired by it; tasks are "
                    "varied by `base`, seeds by `seeds`."
                )
        return made


def equal_compute_steps(own: Mapping[str, Any], target: Mapping[str, Any]) -> int:
    """Steps after which a run has cost the FLOPs that another run cost in all; both are records of a store."""
    for record in (own, target):
        if not record["flops_per_step"]:
            raise ValueError(
                f"{record['run_id']} has no FLOPs per step (a quantized teacher and balancing by gradient norms "
                "cannot be counted), so equal compute cannot be planned; study them without, or set equal_compute: []."
            )
    return max(1, round(target["flops"] / own["flops_per_step"]))


# -- reading a file ---------------------------------------------------------------------------------------------------


def _by_current_keys(data: dict[str, Any]) -> dict[str, Any]:
    """A study's file of before: one of arms has no `vary`, and is read for one more release; one of maps is refused."""
    if before := [key for key in ("maps", "texts") if key in data]:
        raise ValueError(
            f"{before[0]}: is of before; a study of maps has vary: {{kind: maps, student_layers: 3, teacher_layers: "
            "6}, similarity_texts: 512, count_flops: false and baselines: false, as configs/maps.yaml shows."
        )
    if "base" not in data or "vary" in data:
        return data
    names = data.get("arms", list(ARMS))
    warn_of_old_name("arms", f"vary: {{kind: arms, names: {names}}}")
    rest = {key: value for key, value in data.items() if key != "arms"}
    return {"equal_compute": ["none"], **rest, "vary": {"kind": "arms", "names": names}}


def _experiment(number: int, item: Any, folder: Path) -> ExperimentConfig:
    if isinstance(item, ExperimentConfig):
        return item
    if isinstance(item, str):
        return ExperimentConfig.from_yaml(folder / item)
    if not isinstance(item, Mapping):
        raise ValueError(f"base: found {describe(item)}, expected a mapping or the name of a YAML file.")
    try:
        return ExperimentConfig.from_dict(item)
    except ValueError as error:
        raise ValueError(f"base[{number}].{error}") from error


# -- running what is missing ------------------------------------------------------------------------------------------


def _record_baselines(config: ExperimentConfig, store: RunStore, say: Callable[..., None]) -> None:
    if store.has(baseline_id(config, "untrained")):  # the last to be written
        return
    for record in evaluate_baselines(config):
        if not store.has(record["run_id"]):
            store.append_run(record)
            say(f"{record['task']}, {record['arm']}: test {record['metric']} {record['score']:.4f}", flush=True)


def _missing(configs: list[ExperimentConfig], store: RunStore) -> list[ExperimentConfig]:
    done = {record["run_id"] for record in store.records()}
    return [config for config in configs if config.run_id not in done]


def _run_missing(
    configs: list[ExperimentConfig], store: RunStore, workers: int, say: Callable[..., None], count_flops: bool
) -> None:
    missing = _missing(configs, store)
    if len(missing) < len(configs):
        say(f"{len(configs) - len(missing)} of {len(configs)} runs are recorded in {store.path}; {len(missing)} to go.")
    start = time.monotonic()
    for number, result in enumerate(_results(missing, store.path, workers, count_flops), start=1):
        left = (time.monotonic() - start) / number * (len(missing) - number)
        say(f"[{number}/{len(missing)}] {result} · about {left / 60:.0f} min left", flush=True)


def _results(configs: list[ExperimentConfig], path: Path, workers: int, count_flops: bool) -> Iterator[RunResult]:
    """Run and record each, in this process or in several; results as they come."""
    if workers == 1:
        yield from map(_Runs(path, count_flops), configs)
        return
    spawn = multiprocessing.get_context("spawn")  # forked children would share torch's thread pools
    with ProcessPoolExecutor(workers, spawn, _start_worker, (path, count_flops)) as pool:
        futures = [pool.submit(_run_in_worker, config) for config in configs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Runs:
    """Runs one after another, which come seed by seed and task by task: what they share is loaded once."""

    def __init__(self, path: Path, count_flops: bool):
        self.path, self.count_flops = path, count_flops
        self.prepared: Prepared | None = None

    def __call__(self, config: ExperimentConfig) -> RunResult:
        """`run_experiment` without its bar; an error says which run it was, and the result leaves its model behind."""
        try:
            if self.prepared is None or self.prepared.differs(config):
                self.prepared = None  # two teachers at once would fill the memory
                self.prepared = prepare_run(config)
            options = {"prepared": self.prepared, "count_flops": self.count_flops}
            result = run_experiment(config, self.path, progress=False, **options)
        except Exception as error:
            error.add_note(f"in the run {config.run_id}, task {config.task.name}, arm {config.arm}, seed {config.seed}")
            raise
        result.student = None  # a model a run would fill the memory
        return result


_runs_of_worker: _Runs


def _start_worker(path: Path, count_flops: bool) -> None:
    import torch

    global _runs_of_worker
    end_with_parent()
    torch.set_num_threads(1)
    _runs_of_worker = _Runs(path, count_flops)


def _run_in_worker(config: ExperimentConfig) -> RunResult:
    return _runs_of_worker(config)


def _silent(*_args, **_kwargs) -> None:
    """A study without progress lines."""
