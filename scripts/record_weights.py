"""Record how much a term's weight matters: the `all` objective on glosses,
one weight at a time × 0.25 and × 4 → data/recorded/weights.

    .venv/bin/python scripts/record_weights.py [FOLDER]

Every run of a seed starts from the same student and sees the same texts in the same order, so that runs may be compared
in pairs. Fewer steps than `configs/distill_glosses.yaml`: what is asked is whether weights can be told apart,
not how good a student gets.
"""

import sys
from pathlib import Path

from fakit.experiments import ExperimentConfig, RunStore
from fakit.experiments.build import Prepared, prepare
from fakit.experiments.run import RunResult
from fakit.experiments.study import run_missing, run_recorded

ROOT = Path(__file__).resolve().parents[1]
TERMS, FACTORS, SEEDS, STEPS = ("features", "attention", "outputs"), (0.25, 4.0), (0, 1, 2), 120


def runs(start: ExperimentConfig) -> list[ExperimentConfig]:
    """Seed by seed: all weights as in `start` ("default"), then each term's alone times each factor ("features ×
    0.25").
    """
    changes = {"default": {}} | {
        f"{term} × {factor:g}": {f"{term}.weight": factor * getattr(start, term).weight}
        for term in TERMS
        for factor in FACTORS
    }
    return [start.replace(seed=seed, name=name, **change) for seed in SEEDS for name, change in changes.items()]


_prepared: dict[int, Prepared] = {}


def run(config: ExperimentConfig, folder: Path) -> RunResult:
    """Train and record one; task and teacher of a seed are loaded once."""
    if config.seed not in _prepared:
        _prepared.clear()
        _prepared[config.seed] = prepare(config)
    return run_recorded(config, folder, prepared=_prepared[config.seed], count_flops=False)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "data" / "recorded" / "weights"
    start = ExperimentConfig.from_yaml(ROOT / "configs" / "distill_glosses.yaml").replace(**{"training.steps": STEPS})
    store = RunStore.open(folder, what="how much a weight matters: each term's weight × 0.25 and × 4, the others held")
    run_missing(runs(start), store, 1, print, run)
