"""The objective: terms, their weighted sum, and what one evaluation of it gives."""

from fakit.objective.breakdown import Breakdown, Pair, Weights
from fakit.objective.objective import Needs, Objective
from fakit.objective.terms import Attention, Features, Outputs, Task

__all__ = ["Attention", "Breakdown", "Features", "Needs", "Objective", "Outputs", "Pair", "Task", "Weights"]
