"""Memory planner: choose teacher, student, batch, length and card, and see whether a step fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
from transformers import PreTrainedConfig, PreTrainedModel

from fakit.figures import Figure
from fakit.planner import CARDS, Plan, plan, read_config
from fakit.planner.cards import GB
from fakit.widgets.panel import LABEL, WIDE, Panel, spoken, style

Teacher = str | Path | PreTrainedConfig | PreTrainedModel
TEACHERS = (
    "all-MiniLM-L6-v2",
    "bert-base-uncased",
    "gpt2",
    "Qwen2.5-0.5B",
    "Llama-3.2-1B",
    "Llama-3.1-8B",
    "Llama-3.1-70B",
)
SHOWN_CARDS = ("RTX 3060", "T4", "L4", "RTX 4090", "A100 40GB", "A100 80GB", "H200")
FORMS = {"bf16": None, "8-bit": "8bit", "4-bit": "4bit"}
BATCHES = tuple(2**i for i in range(9))
LENGTHS = tuple(2**i for i in range(5, 14))
_BUTTONS = {"description_width": "70px", "button_width": "auto"}
# room for "4096, the teacher's", so that all sliders have one length
_READOUTS = ".fakit-planner .widget-readout { min-width: 136px; }"


class MemoryPlanner(Panel):
    """See `memory_planner`.

    Attributes:
        plan: the `Plan` that is shown; None where the settings allow none (a row longer than the teacher's positions).
        teacher, form, card: buttons; layers, width, batch, seq: sliders; checkpointing, changes: boxes.
            `planner.batch.value = 16` plans anew.
    """

    plan: Plan | None

    def __init__(
        self, teachers: Sequence[Teacher], layers: int | None, batch: int, seq: int, memory: str, quantize: str | None
    ):
        self._configs = {name.split("/")[-1]: config for name, config in map(read_config, teachers)}
        for what, value, known in (
            ("batch", batch, BATCHES),
            ("seq", seq, LENGTHS),
            ("memory", memory, tuple(CARDS)),
            ("quantize", quantize, tuple(FORMS.values())),
        ):
            if value not in known:
                raise ValueError(f"memory_planner offers {what} {', '.join(map(str, known))}; asked was {value!r}.")
        cards = sorted({*SHOWN_CARDS, memory}, key=lambda name: CARDS[name].memory)
        # buttons, not drop-down lists: JupyterLab keeps the arrow keys of a list for itself; these take Tab and Space
        self.teacher = widgets.ToggleButtons(options=list(self._configs), description="teacher", style=_BUTTONS)
        form = next(name for name, value in FORMS.items() if value == quantize)
        self.form = widgets.ToggleButtons(options=list(FORMS), value=form, description="held in", style=_BUTTONS)
        card_labels = [(f"{name} · {CARDS[name].memory / GB:.0f} GB", name) for name in cards]
        card_labels = [(name if name.endswith("GB") else label, name) for label, name in card_labels]
        self.card = widgets.ToggleButtons(options=card_labels, value=memory, description="card", style=_BUTTONS)
        shape = {"continuous_update": False, "style": LABEL, "layout": {"width": WIDE}}
        self.layers = widgets.IntSlider(min=1, max=1, description="student layers", **shape)
        # width 0 stands for the teacher's: a slider takes no None
        self.width = widgets.SelectionSlider(options=[("full", 0)], description="student width", **shape)
        self.batch = widgets.SelectionSlider(options=BATCHES, value=batch, description="batch (rows)", **shape)
        self.seq = widgets.SelectionSlider(options=LENGTHS, value=seq, description="length (tokens)", **shape)
        box = {"indent": False, "layout": {"width": "auto"}}
        self.checkpointing = widgets.Checkbox(description="gradient checkpointing", **box)
        self.changes = widgets.Checkbox(description="show what would save memory", **box)
        self._follow_teacher(layers)
        controls = [self.teacher, self.form, self.card, self.layers, self.width, self.batch, self.seq]
        super().__init__([*controls, widgets.HBox([self.checkpointing, self.changes], layout={"grid_gap": "32px"})])
        self.children = (*self.children, style(_READOUTS))
        self.add_class("fakit-planner")
        self._following = False
        self.teacher.observe(self._change_teacher, "value")
        for control in (*controls[1:], self.checkpointing, self.changes):
            control.observe(self._change, "value")

    def _follow_teacher(self, layers: int | None = None) -> None:
        """Sliders that end where the teacher ends."""
        config = self._configs[self.teacher.value].get_text_config()
        depth, width = config.num_hidden_layers, config.hidden_size
        self.layers.max = depth
        self.layers.value = min(depth, layers or max(1, depth // (2 if depth <= 12 else 4)))
        head = getattr(config, "head_dim", None) or width // config.num_attention_heads
        shares = [(share, int(width * share)) for share in (0.25, 0.5, 0.75)]
        options = [(f"{narrow}", narrow) for _, narrow in shares if narrow % head == 0]
        self.width.options = [*options, (f"{width}, the teacher's", 0)]
        self.width.value = 0

    def _change_teacher(self, change: object) -> None:
        self._following = True  # its sliders move with it: one picture at the end
        try:
            self._follow_teacher()
        finally:
            self._following = False
        self.refresh()

    def _change(self, change: object) -> None:
        if not self._following:
            self.refresh()

    def refresh(self, change: object = None) -> None:
        """Plan and draw anew; a plan for the largest teachers takes seconds."""
        if hasattr(self, "figure"):
            self._sentence.value = spoken("Planning …")
        super().refresh(change)

    def draw(self) -> tuple[Figure, str]:
        """The plan at the controls' values; sets `plan`."""
        try:
            self.plan = plan(
                self._configs[self.teacher.value],
                (self.layers.value, self.width.value or None),
                self.batch.value,
                self.seq.value,
                quantize=FORMS[self.form.value],
                memory=self.card.value,
                checkpointing=self.checkpointing.value,
            )
        except ValueError as error:
            if not hasattr(self, "figure"):
                raise
            self.plan = None  # the picture stays, the sentence says why
            return self.figure, f"No plan: {error}"
        found = self.plan
        said = [
            found.verdict,
            f"{found.flops / 1e12:.3g} TFLOPs a step, about {found.seconds():.2g} s at 40 % of the card's rate.",
        ]
        if self.changes.value:
            said[1:1] = found.advice()
        return found.figure(changes=self.changes.value), " ".join(said)


def memory_planner(
    teacher: Teacher | None = None,
    layers: int | None = None,
    batch: int = 8,
    seq: int = 512,
    memory: str = "T4",
    quantize: str | None = None,
) -> MemoryPlanner:
    """Controls for a distillation step, its memory by part against a card, and a sentence: fits or not.
    No weights are needed.

    Args:
        teacher: stands first among the teachers to choose from: a folder, a hub id, a configuration or a model; a
            recorded model's name chooses it.
        layers: of the student at the start; half of the teacher's unless given, a quarter above 12 layers.
        batch, seq: at the start; powers of two.
        memory: the card at the start, by name.
        quantize: the teacher at the start: None, "8bit" or "4bit".

    Raises:
        ValueError: nothing to be read as teacher, or a start that the controls do not offer.

    >>> planner = memory_planner("gpt2", layers=4, seq=128)
    >>> planner.batch.value = 16
    >>> planner.plan.fits
    True
    """
    first = [] if teacher is None else [teacher]
    return MemoryPlanner([*first, *(t for t in TEACHERS if t not in first)], layers, batch, seq, memory, quantize)
