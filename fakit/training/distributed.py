"""Several processes: `accelerate launch --cpu --num_processes N` as it reads, workers that end with their parent,
and sharded training (FSDP2).
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

_WHOLE = StateDictOptions(full_state_dict=True)


# -- processes
# ----------------------------------------------------------------------------------------------------------


def start_all_processes() -> None:
    """Replace this process by the N processes that `accelerate launch --cpu --num_processes N` was asked for.

    Accelerate (1.15) starts a single one on CPUs and leaves the others to an mpirun, so a run would quietly have a
    smaller global batch than was meant. N stands only on the command line of the launcher, which is this process's
    parent. Does nothing elsewhere.

    Raises:
        ValueError: that launcher, and no N to be found on its command line; or several machines.
    """
    alone = not any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_PORT" in os.environ
    if not (alone and on_cpus):  # MASTER_PORT: the launcher sets it where more than one process was asked for
        return
    from accelerate.commands.launch import launch_command_parser

    launched = _arguments_of_launcher()
    asked = None if launched is None else launch_command_parser().parse_known_args(launched)[0]
    if asked is None or not asked.num_processes or (asked.num_machines or 1) > 1:
        raise ValueError(
            "accelerate launch --cpu started one process of several, and how many were asked for does not stand on its "
            "command line. Give --num_processes N there, or use torchrun --nproc_per_node N -m fakit distill …, which "
            "also takes several machines."
        )
    port = ["--standalone"] if asked.main_process_port is None else ["--master_port", str(asked.main_process_port)]
    command = [sys.executable, "-m", "torch.distributed.run", *port, "--nproc_per_node", str(asked.num_processes)]
    os.execv(sys.executable, [*command, "-m", "fakit", *sys.argv[1:]])


def end_with_parent(every: float = 1.0) -> None:
    """End this process, at once and without a word, when the one that started it ends: also where that is killed (-9).

    A process of `multiprocessing` waits for its parent's end of a pipe; another (torchrun's)
    looks every so many seconds whose child it is.
    """
    parent = multiprocessing.parent_process()
    known = os.getppid()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
        while parent is None and os.getppid() == known:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, name="fakit-parent", daemon=True).start()


def _arguments_of_launcher() -> list[str] | None:
    """What follows `accelerate launch` (or accelerate-launch, or …/launch.py) on the parent's command line."""
    import psutil

    command = psutil.Process().parent().cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands")  # stems of …/launch.py and of the module's name, too
    start = next((place + 1 for place, part in enumerate(command) if Path(part).stem in names), None)
    return None if start is None else command[start:]


# -- sharding
# -----------------------------------------------------------------------------------------------------------


def forget_state() -> None:
    """Before an `Accelerator` is made: forget what an earlier trainer of this process computed in.

    Accelerate keeps one state a process, its precision included, which new `TrainingArguments` empty. Arguments that
    were made before another trainer, as those of a run whose student is healed first, would be refused, or disobeyed.
    """
    AcceleratorState._shared_state = {}


def own_state(accelerator: Accelerator) -> None:
    """Have this process compute as this accelerator was made for, whatever trainer was made since."""
    state = accelerator.state
    state.__dict__ = dict(state.__dict__)  # its own: new arguments empty what is shared
    AcceleratorState._shared_state = dict(state.__dict__)


@contextmanager
def shards_on_cpus() -> Iterator[None]:
    """While an `Accelerator` is made: let `accelerate launch --use_fsdp` shard on CPUs as it does on accelerators.

    torch shards over gloo as well, but Accelerate (1.15) takes its FSDP settings only where it sees processes on
    accelerators, and would fall back to DDP in silence. So it is told, for that moment, that it sees them.
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
            f"FSDP{plugin.fsdp_version} was asked for, and this trainer shards with FSDP2: accelerate launch "
            "--use_fsdp --fsdp_version 2 (its default is 1), or fsdp_version: 2 in the accelerate configuration."
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded module's state, whole in every process. Every process calls it."""
    return get_model_state_dict(model, options=_WHOLE)


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give each process its shards of a whole state that every process holds."""
    set_model_state_dict(model, state, options=_WHOLE)
