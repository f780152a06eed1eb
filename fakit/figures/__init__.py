"""Figures: plain results in, a `Figure` out (plotly, its static twin as SVG, and a sentence). They know no model."""

from fakit import require

require("study", "plotly", "matplotlib")

from fakit.figures.attention import attention_pair, head_matching, head_profiles, rollout, token_attributions
from fakit.figures.cells import gain_by_cell
from fakit.figures.compression import layer_prices, rank_plan
from fakit.figures.divergences import by_temperature, class_pulls, fitted_students, moved_logit
from fakit.figures.fidelity import memory_bars, reliability
from fakit.figures.figure import Figure
from fakit.figures.gradients import term_pulls
from fakit.figures.map_experiment import map_experiment
from fakit.figures.map_gallery import layer_map_gallery
from fakit.figures.maps import layer_map
from fakit.figures.plan import memory_plan
from fakit.figures.quantization import quantization_by_layer
from fakit.figures.results import paired_differences, pareto, retention, scores_by_arm, weight_sensitivity
from fakit.figures.rogue import rogue_scrub
from fakit.figures.runs import runs_overview
from fakit.figures.similarity import bias_curve, rogue_dimensions, similarity_heatmap, similarity_panels
from fakit.figures.similarity_steps import similarity_over_steps
from fakit.figures.story import distillation_story, softened
from fakit.figures.survey import what_is_aligned
from fakit.figures.terms import loss_bars
from fakit.figures.texts import draft_passes, texts_beside
from fakit.figures.training import gradient_bars, gradient_conflict, loss_curves

__all__ = [
    "Figure",
    "attention_pair",
    "bias_curve",
    "by_temperature",
    "class_pulls",
    "distillation_story",
    "draft_passes",
    "fitted_students",
    "gain_by_cell",
    "gradient_bars",
    "gradient_conflict",
    "head_matching",
    "head_profiles",
    "layer_map",
    "layer_map_gallery",
    "layer_prices",
    "loss_bars",
    "loss_curves",
    "map_experiment",
    "memory_bars",
    "memory_plan",
    "moved_logit",
    "paired_differences",
    "pareto",
    "quantization_by_layer",
    "rank_plan",
    "reliability",
    "retention",
    "rogue_dimensions",
    "rogue_scrub",
    "rollout",
    "runs_overview",
    "scores_by_arm",
    "similarity_heatmap",
    "similarity_over_steps",
    "similarity_panels",
    "softened",
    "term_pulls",
    "texts_beside",
    "token_attributions",
    "weight_sensitivity",
    "what_is_aligned",
]
