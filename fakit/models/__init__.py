"""Models: load a teacher, find its blocks, make a student from it, and look before training whether the two fit."""

from fakit.models.blocks import find_blocks, stack_depths
from fakit.models.kinds import without_layerdrop, without_rescaling
from fakit.models.load import load_teacher
from fakit.models.preflight import preflight
from fakit.models.shrink import shrink

__all__ = [
    "find_blocks",
    "load_teacher",
    "preflight",
    "shrink",
    "stack_depths",
    "without_layerdrop",
    "without_rescaling",
]
