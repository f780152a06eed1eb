"""Experiments: configured, run, recorded, compared, reported.

config = ExperimentConfig.from_yaml("configs/distill_glosses.yaml")
result = run_experiment(config, store="runs")
Study(config, vary={"as it is": {}, "low": {"features.weight": 0.1}}, seeds=range(5)).run("runs/weights")
Study.from_yaml("configs/study.yaml").run("runs/study")
report("runs/study")
diagnose("runs/study")
"""

from fakit import require

# what a run is scored and drawn with, too: asked before anything trains
require(
    "study",
    "pandas",
    "yaml",
    "pydantic",
    "plotly",
    "matplotlib",
    "mistune",
    "sklearn",
    "sacrebleu",
    "rouge_score",
    "jiwer",
)

from fakit.experiments.config import ExperimentConfig
from fakit.experiments.doctor import diagnose
from fakit.experiments.map_study import map_scores, recorded_similarity
from fakit.experiments.report import Report, report
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.statistics import gap_closed, paired_bootstrap, paired_difference, paired_table, retention
from fakit.experiments.store import RunStore
from fakit.experiments.study import Study
from fakit.experiments.table import study_table
from fakit.experiments.vary import arms, maps, weights

__all__ = [
    "ExperimentConfig",
    "Report",
    "RunResult",
    "RunStore",
    "Study",
    "arms",
    "diagnose",
    "gap_closed",
    "map_scores",
    "maps",
    "paired_bootstrap",
    "paired_difference",
    "paired_table",
    "recorded_similarity",
    "report",
    "retention",
    "run_experiment",
    "study_table",
    "weights",
]
