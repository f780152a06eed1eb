"""A training run that can be paused, stepped, re-weighted and rewound, and what of it is recorded."""

from fakit.training.session.session import TrainSession

__all__ = ["TrainSession"]
