"""Ask a model something on the side, without a trace in the run's random numbers."""

from contextlib import AbstractContextManager

import torch


def random_state_kept(device: torch.device) -> AbstractContextManager:
    """While open, random numbers may be drawn (dropout); afterwards those of the CPU and of `device` go on as if none
    had been.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
