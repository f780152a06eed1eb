"""Local distillation: each block of a student learns what the teacher's block makes of its inputs, one after the other.

No gradient crosses a block, so that one block's gradients and optimizer are in memory at a time.
Between blocks their inputs lie on disk.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.compression.block_calls import BlockCalls, through
from fakit.compression.block_states import STORED, States
from fakit.compression.spectra import unmoved_mask
from fakit.evaluation.batches import by_length, eval_mode
from fakit.files import check_room, claimed, whole, write_whole
from fakit.losses.features import LOSSES
from fakit.models.blocks import find_blocks, find_stacks
from fakit.models.low_rank_linear import pairs as pairs_of
from fakit.models.positions import longest_row
from fakit.tracing.capture import capture
from fakit.tracing.hooks import given_hidden
from fakit.training.precision import autocast, use_bf16
from fakit.training.teacher_cache.fingerprints import fingerprint

_SIDES = ("student", "teacher")


@dataclass(frozen=True)
class LayerResult:
    """What became of one block.

    Attributes:
        layer: its number, 1…L.
        trained: parameters that were trained: its pairs'; 0 where it has none, and the states only went through.
        losses: the mean of ℓ(f_S(x_T), y) + ℓ(f_S(x_S), y) over the tokens of each epoch, while it is trained.
        seconds: for all of it.
    """

    layer: int
    trained: int
    losses: tuple[float, ...]
    seconds: float


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Sequence[str] | Sequence[Mapping[str, Tensor]],
    tokenizer=None,
    *,
    epochs: int = 1,
    learning_rate: float = 8.6e-5,
    batch_size: int = 32,
    max_length: int | None = None,
    loss: str = "l1_cosine",
    states: str = "float32",
    bf16: bool | str = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
) -> list[LayerResult]:
    """Train the pairs of a student that `compress` made, block by block from the lowest, in place.

        y = f_T(x_T);   L = ℓ(f_S(x_T), y) + ℓ(f_S(x_S), y)

    x_T and x_S are what the blocks before gave, the teacher's and the student's, detached; ℓ is l1_cosine, mean |a - y|
    - log σ(cos(a, y)) over the tokens that are no padding (Lillama, Sy et al. 2025, section 3). Both parts are
    differentiated one after the other. Blocks behind the last pair do not run; with the plan's method "bottom" these
    are the upper ones. Trained are the pairs and their biases; norms and dense weights stay. AdamW for each block, as
    in the paper; ours are no weight decay, a learning rate that falls to 0 in a line, and no dropout.

    Args:
        student, teacher: of one shape, in float32 (bf16 autocast is what makes them fast), on one device.
        texts: with a tokenizer strings; or batches as the models read them, padded on the right. An encoder-decoder
            wants batches, with labels or decoder_input_ids.
        max_length: tokens of a text; the longest that the model's positions allow, at most 512, unless given.
        learning_rate: 8.6e-5 is the paper's, of 13 M tokens; of few tokens take 1e-3.
        loss: a name of `fakit.losses.features.LOSSES`, of which none needs a projection here.
        states: what inputs are stored in: "float32", "bfloat16" or "float16". Four of them lie on disk at a time, for
            each token place of the texts, padding included.
        bf16: "auto", True or False: bf16 autocast where this device is faster in it.
        folder: for the states and each finished block. A run that was killed goes on from there, and ends as it would
            have: give the same models, as they were at the start, and the same arguments. None: a temporary one.

    Returns:
        a `LayerResult` for each block that ran.

    Raises:
        ValueError: before any work: a student without pairs, models that do not fit or in half precision, blocks that
            serve several layers (ALBERT), texts or arguments that cannot be used, a folder of another run or without
            room. While it runs: states that are not finite.
    """
    _check(student, teacher, epochs, learning_rate, loss, states)
    batches = _batches(student, texts, tokenizer, batch_size, max_length)
    device = next(student.parameters()).device
    facts = {
        "student": fingerprint(student),
        "teacher": fingerprint(teacher),
        "data": _hash(batches),
        **{"epochs": epochs, "learning_rate": learning_rate, "loss": loss, "states": states, "seed": seed},
        "bf16": use_bf16(bf16, device),
    }
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fakit-local-"))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claimed(folder / "run.lock", f"{folder}, the folder of a local distillation,"))
        _check_folder(folder, facts)
        stack.enter_context(eval_mode(student))
        stack.enter_context(eval_mode(teacher))
        run = _Run(student, teacher, batches, folder, facts)
        check_room(folder, run.bytes_needed(), "the states between blocks")
        write_whole(folder / "run.json", json.dumps(facts, indent=1))
        return [run.layer(number) for number in range(1, run.last + 1)]


# -- refusals ----------------------------------------------------------------------------------------------------------


def _check(student, teacher, epochs: int, learning_rate: float, loss: str, states: str) -> None:
    ours, theirs = find_blocks(student), find_blocks(teacher)
    name = type(student).__name__
    if not pairs_of(student):
        raise ValueError(f"{name} has no pairs to train: student = low_rank.compress(teacher, keep=0.8) makes them.")
    if [type(b) for b in ours] != [type(b) for b in theirs]:
        raise ValueError(
            f"block by block, a student has the teacher's blocks: {name} has {len(ours)} × {type(ours[0]).__name__}, "
            f"{type(teacher).__name__} {len(theirs)} × {type(theirs[0]).__name__}. Take the teacher it was made of."
        )
    if len({id(block) for block in ours}) < len(ours):
        raise ValueError(
            f"the blocks of {name} serve several layers each, so that what one layer learns undoes what another did: "
            "distill it end to end, with DistillationTrainer."
        )
    widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise ValueError(f"hidden states of student and teacher differ in width: {widths[0]} and {widths[1]}.")
    kinds = {p.dtype for model in (student, teacher) for p in model.parameters() if p.is_floating_point()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(
            f"student and teacher are held in {found}: AdamW's small steps need float32 on both sides. Load them so "
            "(dtype=torch.float32), or model.float(); bf16='auto' then computes in bf16 where that is faster."
        )
    places = {p.device for model in (student, teacher) for p in model.parameters()}
    if len(places) > 1:
        raise ValueError(f"student and teacher lie on {', '.join(sorted(map(str, places)))}: move them to one device.")
    shared = {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    if shared:
        raise ValueError("student and teacher share weights, and training would change both: low_rank.compress copies.")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs={epochs!r} was requested; give a whole number from 1 on.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate!r} was requested; it is above 0.")
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not known; choose one of {', '.join(LOSSES)}.")
    if states not in STORED:
        raise ValueError(f"states={states!r} is not known; they are stored in {', '.join(map(repr, STORED))}.")


def _batches(model, texts, tokenizer, batch_size: int, max_length: int | None) -> list[dict[str, Tensor]]:
    texts = list(texts) if not isinstance(texts, str) else [texts]
    if not texts:
        raise ValueError("texts hold nothing: give a few hundred, better thousands.")
    if all(isinstance(text, Mapping) for text in texts):
        batches = [dict(batch) for batch in texts]
    elif not all(isinstance(text, str) for text in texts):
        kinds = ", ".join(sorted({type(text).__name__ for text in texts}))
        raise ValueError(f"texts are strings, or batches that a collator made; these are {kinds}.")
    elif tokenizer is None:
        raise ValueError("texts were given as strings, and no tokenizer: distill(student, teacher, texts, tokenizer).")
    else:
        longest = min(longest_row(model) or 512, 512) if max_length is None else max_length
        rows = tokenizer(texts, truncation=True, max_length=longest)
        lengths = [len(ids) for ids in rows["input_ids"]]
        batches = [
            dict(tokenizer.pad({name: [x[i] for i in chosen] for name, x in rows.items()}, return_tensors="pt"))
            for chosen in by_length(lengths, batch_size, tokens=None)
        ]
    for batch in batches:
        unmoved_mask(model, batch)
    return batches


def _hash(batches: list[dict[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, x in sorted(batch.items()):
            if isinstance(x, Tensor):
                digest.update(f"{name} {tuple(x.shape)}".encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_folder(folder: Path, facts: dict) -> None:
    path = folder / "run.json"
    if not path.is_file():
        if left := sorted(p.name for p in folder.iterdir() if p.name != "run.lock"):
            raise ValueError(f"{folder} holds {', '.join(left[:4])} and no run.json: give a folder of its own.")
        return
    found = json.loads(path.read_text())
    if different := [name for name in facts if found.get(name) != facts[name]]:
        said = "; ".join(f"{name}: {found.get(name)!s:.12} there, {facts[name]!s:.12} here" for name in different)
        raise ValueError(
            f"{folder} holds a run of something else ({said}). To go on with it, give the models as they were at its "
            "start and the same arguments; else choose another folder."
        )


# -- the run -----------------------------------------------------------------------------------------------------------


class _Run:
    """All that one layer after the other needs."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: list, folder: Path, facts: dict):
        self.batches, self.folder, self.facts = batches, folder, facts
        self.blocks = {"student": find_blocks(student), "teacher": find_blocks(teacher)}
        self.last = max(i for i, block in enumerate(self.blocks["student"], 1) if pairs_of(block))
        starts = [1]
        for stack in find_stacks(student):
            starts.append(starts[-1] + len(stack.blocks))
        self.starts = set(starts)  # layers whose inputs the models make themselves
        self.parameter = next(student.parameters())
        self.width = student.config.get_text_config().hidden_size
        traces = [capture(teacher, batch, hidden_states=[0], logits=False) for batch in batches]
        self.masks = {i: [trace.layer_mask(i) for trace in traces] for i in range(1, self.last + 1)}
        with self.computing():
            self.calls = {
                side: BlockCalls(model, batches[0], self.starts, self.last)
                for side, model in (("student", student), ("teacher", teacher))
            }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Forward passes without graph."""
        with torch.no_grad(), self.autocast():
            yield

    def autocast(self) -> torch.autocast:
        """In bf16, where the run computes in it."""
        return autocast(self.parameter.device, self.facts["bf16"])

    def bytes_needed(self) -> int:
        """Of four states, the teacher's and the student's before and after a block, at the layer with most places."""
        places = max(sum(mask.numel() for mask in masks) for masks in self.masks.values())
        return 4 * places * self.width * np.dtype(STORED[self.facts["states"]][1]).itemsize

    def layer(self, number: int) -> LayerResult:
        """Train one block and pass on what it gives; or read what was done before."""
        done = self.folder / f"layer_{number:03}.safetensors"
        pairs = pairs_of(self.blocks["student"][number - 1])
        if done.is_file():
            return _read(done, pairs)
        start = time.perf_counter()
        if number in self.starts:
            self._enter(number)
        self._pass_on("teacher", number)  # the targets, too
        trained = [p for pair in pairs.values() for p in pair.parameters()]
        losses = self._train(number, trained) if trained else []
        if number < self.last and number + 1 not in self.starts:
            self._pass_on("student", number)
        result = LayerResult(number, sum(p.numel() for p in trained), tuple(losses), time.perf_counter() - start)
        weights = {f"{name}:{own}": x for name, pair in pairs.items() for own, x in pair.state_dict().items()}
        with whole(done) as partial:  # the last file of a layer: without it, the layer is done again
            save_file(weights, partial, {"result": json.dumps(vars(result))})
        ended = number == self.last or number + 1 in self.starts
        for side in _SIDES:
            self._inputs_path(side, number).unlink()
            if ended:
                self._path(side, number).unlink(missing_ok=True)
        return result

    # -- states on disk ------------------------------------------------------------------------------------------------

    def _path(self, side: str, number: int, what: str = "out") -> Path:
        return self.folder / f"{side}_{number:03}.{what}"

    def _inputs_path(self, side: str, number: int) -> Path:
        return self._path(side, number, "in") if number in self.starts else self._path(side, number - 1)

    def _open(self, path: Path, number: int, new: bool = False) -> States:
        shapes = [(*mask.shape, self.width) for mask in self.masks[number]]
        return States(path, shapes, self.facts["states"], self.parameter, new)

    def _enter(self, number: int) -> None:
        """The inputs of a stack's first block."""
        for side, calls in self.calls.items():
            with whole(self._path(side, number, "in")) as partial, self.computing():
                states = self._open(partial, number, new=True)
                for b, batch in enumerate(self.batches):
                    self._put(states, number, b, given_hidden(*calls.of(batch, number)))

    def _pass_on(self, side: str, number: int) -> None:
        """What a block makes of its inputs."""
        block, calls = self.blocks[side][number - 1], self.calls[side]
        inputs = self._open(self._inputs_path(side, number), number)
        with whole(self._path(side, number)) as partial, self.computing():
            states = self._open(partial, number, new=True)
            for b, batch in enumerate(self.batches):
                self._put(states, number, b, through(block, calls.of(batch, number), inputs[b]))

    def _put(self, states: States, number: int, b: int, x: Tensor) -> None:
        kept = states.put(b, x)
        if not kept[self.masks[number][b]].isfinite().all():
            raise ValueError(
                f"states at layer {number} are not finite in batch {b}, stored in {self.facts['states']}: "
                "float16 ends at 65,504, take states='bfloat16' or 'float32'; in float32, look at the models."
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def _train(self, number: int, trained: list[nn.Parameter]) -> list[float]:
        block, loss, epochs = self.blocks["student"][number - 1], LOSSES[self.facts["loss"]], self.facts["epochs"]
        inputs = {side: self._open(self._inputs_path(side, number), number) for side in _SIDES}
        targets = self._open(self._path("teacher", number), number)
        optimizer = torch.optim.AdamW(trained, lr=self.facts["learning_rate"], weight_decay=0.0)
        steps = epochs * len(self.batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        order = torch.Generator().manual_seed(1000 * self.facts["seed"] + number)
        means = []
        with _only_trained(block, trained):
            for _ in range(epochs):
                total = torch.zeros((), device=self.parameter.device)
                for b in torch.randperm(len(self.batches), generator=order).tolist():
                    mask, y = self.masks[number][b], targets[b]
                    for side in ("teacher", "student"):  # whose inputs; one graph at a time
                        with self.computing():
                            call = self.calls[side].of(self.batches[b], number)
                        with self.autocast():
                            given = through(block, call, inputs[side][b])
                        part = loss(given, y, mask)
                        part.backward()
                        total += part.detach() * mask.sum()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                means.append((total / sum(mask.sum() for mask in self.masks[number])).item())
        return means


def _read(done: Path, pairs: dict[str, nn.Module]) -> LayerResult:
    """Put what a finished layer learned into its pairs."""
    stored = load_file(done)
    for name, pair in pairs.items():
        pair.load_state_dict({own: stored[f"{name}:{own}"] for own in pair.state_dict()})
    with safe_open(done, "pt") as file:
        result = json.loads(file.metadata()["result"])
    return LayerResult(**result | {"losses": tuple(result["losses"])})


@contextmanager
def _only_trained(block: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Inside, of a block's parameters only these get gradients."""
    before = [(p, p.requires_grad) for p in block.parameters()]
    own = {id(p) for p in trained}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in own)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
