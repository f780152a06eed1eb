"""What a notebook's setup cell uses.

    session = setup(PROFILE, seed=SEED, device=DEVICE, model=MODEL)
    task, teacher, tokenizer = session.load(TASK)
    steps = session.pick(quick=30, workshop=200, full=2000)

The session draws itself as plain HTML: no widget, so that it shows on GitHub and in a report too.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fakit.tasks.task import TextTask

PROFILES = ("quick", "workshop", "full")


class Loaded(NamedTuple):
    """A task, a frozen teacher for it, and the teacher's tokenizer."""

    task: TextTask
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Session:
    """What `setup` found and set; draws itself as a table.

    Attributes:
        profile: "quick", "workshop" or "full".
        seed: the seed of python, numpy and torch.
        device: where models go, e.g. "cpu" or "cuda:0".
        model: what the parameters cell asked for; None is the embedded default.
        facts: name → value, as the table shows them.
    """

    profile: str
    seed: int
    device: str
    model: str | None
    facts: dict[str, str] = field(repr=False)

    def pick(self, *, quick: Any, workshop: Any = None, full: Any = None) -> Any:
        """The value for this profile; a larger profile that is left out takes the next smaller one's."""
        chosen = {"quick": quick, "workshop": quick if workshop is None else workshop}
        chosen["full"] = chosen["workshop"] if full is None else full
        return chosen[self.profile]

    def load(self, task: str, *, labels: int | str | None = None, quantize: str | None = None) -> Loaded:
        """The task, its teacher and the teacher's tokenizer, as the parameters cell asks for them.

        Args:
            task: for `load_task`: "glosses", "reviews", "scans", "glue/sst2", "hub:ID", or a path to data.
            labels: labeled examples that the student gets; None takes the task's default.
            quantize: the teacher's: None, "8bit" or "4bit".

        Returns:
            (task, teacher, tokenizer). The teacher is the embedded one of the task, or the session's model, frozen.

        Raises:
            ValueError: what `load_task`, `embedded_teacher` or `load_teacher` refuses.
        """
        from transformers import AutoTokenizer

        from fakit.models.load import load_teacher, resolve_model
        from fakit.tasks import embedded_teacher, load_task

        data = load_task(task, labels=labels, seed=self.seed)
        if self.model in (None, "embedded"):
            return Loaded(data, *embedded_teacher(task, quantize=quantize, device=self.device))
        teacher = load_teacher(self.model, task=data.model_task, quantize=quantize, device=self.device)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(self.model), trust_remote_code=False)
        return Loaded(data, teacher, tokenizer)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th scope='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self.facts.items())
        return f"<table>{rows}</table>"

    def __str__(self) -> str:
        return "\n".join(f"{name:13} {value}" for name, value in self.facts.items())

    __repr__ = __str__


def setup(
    profile: str = "quick",
    seed: int = 0,
    device: str | None = None,
    model: str | None = None,
) -> Session:
    """Seed python, numpy and torch, set the plotly template, quiet the libraries, and say what this notebook runs on.

    Args:
        profile: "quick" (CI, 2 CPU cores), "workshop" (a class) or "full".
        seed: a whole number ≥ 0.
        device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" takes a GPU where there is one.
        model: passed through, for the table.

    Raises:
        ValueError: an unknown profile, a seed that is no whole number ≥ 0, or a device that this machine has not.
    """
    import numpy as np
    import torch

    if profile not in PROFILES:
        raise ValueError(f"PROFILE = {profile!r} is not known: use one of {', '.join(PROFILES)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"SEED = {seed!r}: a whole number from 0 to 2³² − 1 is needed")
    device = _device(device)
    random.seed(seed)
    np.random.seed(seed)  # libraries that draw from numpy's global state
    torch.manual_seed(seed)  # the CPU and every GPU

    from fakit.figures import theme
    from fakit.training.environment import environment
    from fakit.training.precision import use_bf16

    theme.use_template()
    _quiet()
    on_gpu = device.startswith("cuda")
    found = environment(device if on_gpu else None)
    versions, machine = found["versions"], found["machine"]
    facts = {
        "Python": versions["python"],
        **{name: versions[name] or "not installed" for name in ("torch", "transformers", "fakit")},
        "device": f"{device} ({machine['gpu' if on_gpu else 'processor']})",
        "memory": _memory(device),
        "bf16": "faster than float32, used where it says autocast"
        if use_bf16(device=device)
        else "slower than float32, not used",
        "threads": f"{machine['threads']} of {machine['cores']} cores",
        "seed": str(seed),
        "profile": profile,
        "model": model or "embedded default",
    }
    return Session(profile, seed, device, model, facts)


class _Printed(logging.Handler):
    """What the kit logs, printed: what it has to say of the data is no error, and a notebook shows the log in red."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


def _quiet() -> None:
    """Leave the page to the notebook: no library reports, no bars for work of a second; errors still show."""
    import warnings

    import datasets
    import transformers

    log = logging.getLogger("fakit")
    if not log.handlers:
        log.addHandler(_Printed())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # peft asks the model by the old name; nothing a reader could change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _device(asked: str | None) -> str:
    import torch

    mps = torch.backends.mps.is_available()
    if asked in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"DEVICE = {asked!r} is no device: use None, 'cpu', 'cuda', 'cuda:0' or 'mps'") from error
    count = torch.cuda.device_count()
    if (device.type == "cuda" and (device.index or 0) >= count) or (device.type == "mps" and not mps):
        raise ValueError(
            f"DEVICE = {asked!r}: this machine has {count} CUDA devices{'' if mps else ' and no MPS'}; DEVICE = None "
            "takes what is there"
        )
    return asked


def _memory(device: str) -> str:
    """Free and total memory: of the GPU, or of the machine."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
