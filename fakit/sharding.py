"""What sharded training (FSDP2) needs beside the Trainer: a whole student before and after, and shards on CPUs, too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

_WHOLE = StateDictOptions(full_state_dict=True)


@contextmanager
def shards_on_cpus() -> Iterator[None]:
    """While an `Accelerator` is made: let `accelerate launch --use_fsdp` shard on CPUs as it does on accelerators.

    torch shards over gloo as well, but Accelerate (1.15) takes its FSDP settings only where it sees processes on accelerators, and
    would fall back to DDP in silence. So it is told, for that moment, that it sees them.
    """
    state = PartialState._shared_state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    told = wanted and state.get("distributed_type") is DistributedType.MULTI_CPU
    if told:
        state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.get("distributed_type") is DistributedType.MULTI_GPU and told:  # it failed before it came to FSDP
            state["distributed_type"] = DistributedType.MULTI_CPU


def check_sharding(accelerator: Accelerator) -> None:
    """Raise ValueError for FSDP1, whose flattened parameters nothing here was made for."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP{plugin.fsdp_version} was asked for, and this trainer shards with FSDP2: accelerate launch --use_fsdp --fsdp_version 2 "
            "(its default is 1), or fsdp_version: 2 in the accelerate configuration."
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded module's state, whole in every process. Every process calls it."""
    return get_model_state_dict(model, options=_WHOLE)


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give each process its shards of a whole state that every process holds."""
    set_model_state_dict(model, state, options=_WHOLE)
