"""Experiments: configured, run, recorded, compared, reported.

config = ExperimentConfig.from_yaml("configs/distill_glosses.yaml")
result = run_experiment(config, store="runs")
store = run_study(StudyConfig.from_yaml("configs/study.yaml"), out="runs/study")
report("runs/study")
"""

from fakit import require

# what a run is scored and drawn with, too: asked before anything trains
require("study", "pandas", "yaml", "plotly", "matplotlib", "mistune", "sklearn", "sacrebleu", "rouge_score", "jiwer")

from fakit.experiments.config import ExperimentConfig
from fakit.experiments.map_study import MapStudyConfig, map_scores, run_map_study, study_from_yaml
from fakit.experiments.report import Report, report
from fakit.experiments.run import RunResult, run_experiment
from fakit.experiments.statistics import gap_closed, paired_bootstrap, paired_difference, paired_table, retention
from fakit.experiments.store import RunStore
from fakit.experiments.study import StudyConfig, run_study
from fakit.experiments.table import study_table

__all__ = [
    "ExperimentConfig",
    "MapStudyConfig",
    "Report",
    "RunResult",
    "RunStore",
    "StudyConfig",
    "gap_closed",
    "map_scores",
    "paired_bootstrap",
    "paired_difference",
    "paired_table",
    "report",
    "retention",
    "run_experiment",
    "run_map_study",
    "run_study",
    "study_from_yaml",
    "study_table",
]
