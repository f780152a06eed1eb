"""Small widgets for notebooks: labeled controls, a figure that follows them, and a sentence that says what it shows.

The display of each also carries a picture (SVG) and a sentence, for pages without a kernel. Only this package imports
ipywidgets and anywidget, and nothing in the kit imports this package.
"""

from fakit import require

require("lab", "ipywidgets", "anywidget", "traitlets", "IPython", "plotly", "matplotlib", "pandas")

from fakit.widgets.attention.viewer import AttentionViewer, attention_viewer
from fakit.widgets.cockpit import Cockpit, cockpit
from fakit.widgets.compression import LayerRemover, RankBudget, layer_remover, rank_budget
from fakit.widgets.explorer import Explorer, explorer
from fakit.widgets.loss_laboratory import LossLaboratory, loss_laboratory
from fakit.widgets.mapping.board import MappingBoard, mapping_board
from fakit.widgets.panel import Panel
from fakit.widgets.planner import MemoryPlanner, memory_planner
from fakit.widgets.runs.browser import RunBrowser, run_browser
from fakit.widgets.similarity import EstimatorSwitch, RogueScrubber, estimator_switch, rogue_scrubber
from fakit.widgets.survey.map import SurveyMap, survey_map
from fakit.widgets.temperature import TemperatureExplorer, temperature_explorer
from fakit.widgets.weights import LossWeights, loss_weights

__all__ = [
    "AttentionViewer",
    "Cockpit",
    "EstimatorSwitch",
    "Explorer",
    "LayerRemover",
    "LossLaboratory",
    "LossWeights",
    "MappingBoard",
    "MemoryPlanner",
    "Panel",
    "RankBudget",
    "RogueScrubber",
    "RunBrowser",
    "SurveyMap",
    "TemperatureExplorer",
    "attention_viewer",
    "cockpit",
    "estimator_switch",
    "explorer",
    "layer_remover",
    "loss_laboratory",
    "loss_weights",
    "mapping_board",
    "memory_planner",
    "rank_budget",
    "rogue_scrubber",
    "run_browser",
    "survey_map",
    "temperature_explorer",
]
