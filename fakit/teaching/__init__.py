"""What the notebooks stand on: their set-up, their exercises, and what runs them and writes their pages."""

from fakit import require

require(
    "lab", "nbclient", "nbconvert", "nbformat", "latex2mathml", "IPython", "jinja2", "pygments", "plotly", "matplotlib"
)

from fakit.teaching.exercises import Exercise, Result, is_empty, one_of, predict
from fakit.teaching.setup import Session, setup
from fakit.teaching.words import say

__all__ = ["Exercise", "Result", "Session", "is_empty", "one_of", "predict", "say", "setup"]
