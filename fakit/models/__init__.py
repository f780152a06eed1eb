"""Models: load a teacher, find its blocks, make a student from it, and look before training whether the two fit."""

from fakit.models.blocks import find_blocks
from fakit.models.load import load_teacher
from fakit.models.preflight import preflight
from fakit.models.shrink import shrink

__all__ = ["find_blocks", "load_teacher", "preflight", "shrink"]
