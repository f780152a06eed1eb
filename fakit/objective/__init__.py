"""The objective: terms, their weighted sum, and what one evaluation of it gives."""

from fakit.layer_maps import Pair
from fakit.objective.attention import Attention
from fakit.objective.breakdown import Breakdown
from fakit.objective.earth_mover import EarthMover
from fakit.objective.feature_terms import Dynamics, Flow, LayerAttention, Pooled
from fakit.objective.features import Features
from fakit.objective.lens import Lens
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.objective.schedules import Schedule
from fakit.objective.task import Task
from fakit.objective.term import FrozenTermError, Term
from fakit.objective.weights import Weights

__all__ = [
    "Attention",
    "Breakdown",
    "CountedBatch",
    "Dynamics",
    "EarthMover",
    "Features",
    "Flow",
    "FrozenTermError",
    "LayerAttention",
    "Lens",
    "Needs",
    "Objective",
    "Outputs",
    "Pair",
    "Pooled",
    "Schedule",
    "Task",
    "Term",
    "Weights",
]
