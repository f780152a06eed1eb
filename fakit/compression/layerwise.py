"""Iterative layer-wise distillation: take out the cheapest layer, heal beside the cut, and again.

After Kovalev & Tikhomirov 2025 (arXiv 2511.05085). A round scores every layer of the student (at first the teacher
itself), takes the cheapest one out, and trains the two layers beside the cut, all others frozen, to do as the original
teacher does:

    L = KL(teacher ‖ student) / 100 + MSE(layer after the cut) + MSE(last layer)        over valid tokens

What is ours: padding is masked; the student's last layer aims at the teacher's last one, whichever layers are gone, for
that is what the head reads; and rounds are seeded each by itself, so that a run that was stopped goes on as if it had
not been.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fakit.compression.importance import Quality, check_measure, divergence, importance, layers_of, measured
from fakit.evaluation.batches import device_of
from fakit.files import check_room, claimed, sha256, sync, write_whole
from fakit.layer_maps import LayerMap
from fakit.models.blocks import without_adapter
from fakit.models.shrink import shrink, why_not
from fakit.objective.features import Features
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.training.checkpoints import differences, versions
from fakit.training.ownership import data_fingerprint
from fakit.training.teacher_cache.fingerprints import fingerprint
from fakit.training.trainer import DistillationTrainer

KL_WEIGHT = 0.01  # of the paper
SCORED = 256  # rows that layers are scored on, unless others are given
ROUND = "round.json"
logger = logging.getLogger(__name__)


@dataclass
class Round:
    """One round: what was taken out, why, and what it cost.

    Attributes:
        number: 1, 2, …
        removed: numbers of the teacher's layers that are gone; one, but in one-shot removal.
        importance: {teacher layer: cost} of every layer the student still had, by the measure that was asked.
        layers: the teacher's layers that stay, rising.
        kl_cut, kl_healed: KL(teacher ‖ student) in nats, after the cut and after healing, on the scored rows.
        quality_cut, quality_healed: by the user's function; None without one.
        seconds: of the whole round.
        folder: where it is saved: a plain transformers folder, with round.json beside the model; None where it is not.
        student: the model, in evaluation mode; of the last round alone.
    """

    number: int
    removed: list[int]
    importance: dict[int, float]
    layers: list[int]
    kl_cut: float
    kl_healed: float
    quality_cut: float | None
    quality_healed: float | None
    seconds: float
    folder: Path | None = field(default=None, compare=False)
    student: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    @property
    def layer_map(self) -> LayerMap:
        """Student layer j ← the teacher layer that it was: composed over all rounds so far."""
        return LayerMap(enumerate(self.layers, 1), name="survivors")

    def __str__(self) -> str:
        gone = ", ".join(map(str, self.removed))
        quality = ""
        if self.quality_cut is not None and self.quality_healed is not None:
            quality = f", quality {self.quality_cut:.4f} → {self.quality_healed:.4f}"
        return (
            f"round {self.number}: without teacher layer{'s' * (len(self.removed) > 1)} {gone}, {len(self.layers)} stay"
            f"; healing: KL {self.kl_cut:.4f} → {self.kl_healed:.4f}{quality}; {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Healing:
    """How a round's student is trained; `steps` are optimizer steps for each layer that is taken out."""

    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-4
    bf16: bool | str = False
    seed: int = 0

    def arguments(self, folder: str | Path, removed: int, number: int, device: torch.device) -> TrainingArguments:
        """transformers' arguments for a round that takes out so many layers, on the teacher's device."""
        args = TrainingArguments(
            str(folder),
            max_steps=self.steps * removed,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type="linear",
            bf16=self.bf16 is True,
            use_cpu=device.type == "cpu",
            seed=self.seed_of(number),
            save_strategy="no",
            logging_steps=max(1, self.steps // 5),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
        )
        args.bf16 = self.bf16  # "auto" is decided by the DistillationTrainer
        return args

    def seed_of(self, number: int) -> int:
        """Of a round: of its own, so that it depends on nothing that was drawn before."""
        return random.Random(f"{self.seed}, round {number}").getrandbits(32)


def prune(
    teacher: PreTrainedModel,
    layers: int | None = None,
    data=None,
    collator: Callable | None = None,
    *,
    at_least: float | None = None,
    importance: str = "kl",
    quality: Quality | None = None,
    scored=None,
    one_shot: bool = False,
    steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    bf16: bool | str = False,
    seed: int = 0,
    tokenizer=None,
    out: str | Path | None = None,
    resume: bool = False,
) -> list[Round]:
    """Take layers out of a copy of the teacher, one a round, healing after each; the last round has the student.

    Args:
        teacher: a frozen transformers model of one stack, which is left as it is; all runs on its device. The adapter
            of a PEFT model is merged, in a copy.
        layers: stop at this depth, 1…L - 1.
        data: encoded rows to heal on: a dataset or a list with input_ids (and attention_mask); labels teach nothing
            here.
        collator: pads a list of rows to a batch of tensors.
        at_least: stop before the round whose student, healed, would be of a lower quality; with `quality`. That round
            is not among those that are returned; the log says what it came to.
        importance: how the cheapest layer is found: one of `fakit.compression.importance.MEASURES`.
        quality: a function of a model, higher is better: what is reported before and after healing.
        scored: encoded rows that layers are scored and KL is reported on; the first 256 of `data` unless given.
        one_shot: take out all layers in one round, by the scores of the whole teacher, and heal beside all cuts, for as
            many steps as the rounds would have had together.
        steps: optimizer steps of healing for each layer that is taken out; 0 for none.
        batch_size, learning_rate: of healing; the rate falls linearly to 0 in each round.
        bf16: autocast; "auto" where the device is fast at it.
        seed: of the order of the data, and of dropout.
        tokenizer: saved beside each student.
        out: a folder. Each finished round is saved in it as round-1, round-2, …, whole or not at all.
        resume: go on from the rounds in `out`.

    Returns:
        The rounds, in order; none where the first one falls below `at_least`.

    Raises:
        ValueError: before any work: a depth that the teacher has not, or cannot be cut to (hybrids keep the kinds of
            blocks they cannot run without); encoder-decoders, shared blocks; no data; an unknown importance; outputs
            that KL does not compare (regression); rounds in `out` that were made otherwise, with both sides. Later:
            costs or a quality that are not finite, no layer left that can be taken out.

    >>> rounds = prune(teacher, layers=3, data=rows, collator=collator)  # doctest: +SKIP
    >>> rounds[-1].student.save_pretrained("student"); rounds[-1].layer_map  # doctest: +SKIP
    """
    depth = len(layers_of(teacher))
    healing = Healing(steps, batch_size, learning_rate, bf16, seed)
    _check(depth, layers, at_least, importance, quality, one_shot, data, collator, healing)
    scored = _first(data, SCORED) if scored is None else scored
    if len(scored) == 0:
        raise ValueError("scored=… holds no rows: there is nothing to score layers on.")
    if out is None and resume:
        raise ValueError("resume=True goes on from rounds that are saved, and no folder was given; out=….")
    if without_adapter(teacher) is not teacher:
        teacher = copy.deepcopy(teacher).merge_and_unload()
    divergence(teacher, teacher, _first(scored, 2), collator)  # says what KL cannot compare
    if layers is not None:
        _check_depth(teacher, depth, layers)
    settings = {
        "layers": layers,
        "at_least": at_least,
        "importance": importance,
        "quality": None if quality is None else getattr(quality, "__qualname__", type(quality).__qualname__),
        "one_shot": one_shot,
        **asdict(healing),
    }
    work = (teacher, depth, layers, data, collator, at_least, importance, quality, scored, one_shot, healing)
    if out is None:
        return _prune(*work, [], None)
    out = Path(out)
    at_most = 1 if one_shot else depth - (layers or 1)
    check_room(out, at_most * 4 * sum(parameter.numel() for parameter in teacher.parameters()), "the rounds")
    with claimed(out / ".rounds.lock", str(out)):
        settings |= {
            "versions": versions(),
            "teacher": fingerprint(teacher),
            "data": data_fingerprint(data),
            "scored": data_fingerprint(scored),
        }
        rounds = _read(out, settings)
        if rounds and not resume:
            raise ValueError(
                f"{out} holds {len(rounds)} finished rounds already; resume=True goes on from them. Or choose another "
                "folder."
            )
        return _prune(*work, rounds, lambda made: _write(out, made, settings, tokenizer))


# -- before any work --------------------------------------------------------------------------------------------------


def _check(depth, layers, at_least, measure, quality, one_shot, data, collator, healing: Healing) -> None:
    if layers is None and at_least is None:
        raise ValueError("when to stop was not said: layers=… (a depth), or at_least=… (a quality), or both.")
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers < depth):
        choice = f"choose 1…{depth - 1}" if depth > 1 else "which leaves nothing to take out"
        raise ValueError(f"layers={layers!r} asked of a {depth}-layer teacher, of which at least one goes: {choice}.")
    check_measure(measure, quality)
    if at_least is not None and quality is None:
        raise ValueError(f"at_least={at_least} is a quality, and no function says it: quality=lambda model: ….")
    if at_least is not None and not math.isfinite(at_least):
        raise ValueError(f"at_least={at_least}: a quality to stop at is a finite number.")
    if one_shot and (layers is None or at_least is not None):
        raise ValueError("one_shot=True takes out all layers at once: give layers=…, the depth, and no at_least.")
    if not hasattr(type(data), "__len__") or len(data) == 0:
        raise ValueError("there is no data to score layers and to heal on: data=… (encoded rows, as many as it says).")
    if collator is None:
        raise ValueError("no collator was given, which makes batches of rows: collator=….")
    whole = {"steps": (healing.steps, 0), "batch_size": (healing.batch_size, 1), "seed": (healing.seed, 0)}
    for name, (value, lowest) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name}={value!r}: a whole number of at least {lowest} was expected.")
    if not (isinstance(healing.learning_rate, int | float) and 0 < healing.learning_rate < math.inf):
        raise ValueError(f"learning_rate={healing.learning_rate!r}: a number above 0 was expected.")


def _first(data, rows: int):
    return [data[i] for i in range(min(rows, len(data)))]


def _check_depth(teacher: PreTrainedModel, depth: int, layers: int) -> None:
    """Refuse a depth that is not reached where each time the first layer goes that can."""
    kept = list(range(1, depth + 1))
    while len(kept) > layers:
        shorter = next((some for i in kept if not why_not(teacher, some := _without(kept, i))), None)
        if shorter is None:
            shrink(teacher, layers=_without(kept, kept[-1]))  # refused, with the depths and kinds that work
        kept = shorter


def _without(numbers: list[int], gone: int) -> list[int]:
    return [i for i in numbers if i != gone]


# -- the rounds -------------------------------------------------------------------------------------------------------


def _prune(
    teacher, depth, layers, data, collator, at_least, measure, quality, scored, one_shot, healing, rounds, save
) -> list[Round]:
    if at_least is not None and not rounds and (found := measured(quality, teacher)) < at_least:
        raise ValueError(f"at_least={at_least} was asked, and the teacher itself comes to {found}; ask for less.")
    current: PreTrainedModel = teacher
    kept = list(range(1, depth + 1))
    if rounds:
        kept = rounds[-1].layers
        current = rounds[-1].student = _load(rounds[-1].folder, teacher)
    for number in count(len(rounds) + 1):
        if len(kept) == (1 if layers is None else layers):
            break
        began = time.perf_counter()
        costs = importance(current, measure, scored, collator, teacher, quality)
        stays = _cheapest_gone(current, costs, len(kept) - layers if one_shot else 1)
        set_seed(healing.seed_of(number))
        student = shrink(current, layers=stays).eval()
        before = kept
        kept = [kept[i - 1] for i in stays]
        (kl_cut,) = divergence(teacher, student, scored, collator)
        quality_cut = None if quality is None else measured(quality, student)
        _heal(
            teacher, student, kept, cuts(stays, len(before)), data, collator, healing, len(before) - len(kept), number
        )
        (kl_healed,) = divergence(teacher, student, scored, collator)
        if not math.isfinite(kl_healed):
            raise ValueError(
                f"healing round {number} diverged: KL to the teacher is {kl_healed} after it, and was {kl_cut:.4g} "
                f"before. Lower learning_rate={healing.learning_rate}."
            )
        made = Round(
            number,
            sorted({*before} - {*kept}),
            {before[i - 1]: cost for i, cost in costs.items()},
            kept,
            kl_cut,
            kl_healed,
            quality_cut,
            None if quality is None else measured(quality, student),
            time.perf_counter() - began,
            student=student,
        )
        if at_least is not None and made.quality_healed < at_least:
            logger.warning("Stopped before this round, below at_least=%s: %s", at_least, made)
            break
        if save is not None:
            save(made)
        if rounds:
            rounds[-1].student = None
        rounds.append(made)
        current = student
        logger.info("%s", made)
    return rounds


def _cheapest_gone(model: PreTrainedModel, costs: dict[int, float], how_many: int) -> list[int]:
    """The layers that stay when the cheapest go, one after the other, of those that the model can run without."""
    stays = list(costs)
    for _ in range(how_many):
        ranked = sorted(stays, key=lambda i: costs[i])
        left = next((some for i in ranked if not why_not(model, some := _without(stays, i))), None)
        if left is None:
            shrink(model, layers=_without(stays, ranked[0]))  # refused, with the kinds that it cannot run without
        stays = left
    return stays


def cuts(stays: list[int], depth: int) -> list[int]:
    """Where layers are gone: after which of the layers that stay, counted anew; 0 is before the first.

    >>> cuts([2, 3, 6], 6)
    [0, 2]
    """
    edges = [0, *stays, depth + 1]
    return [place for place in range(len(stays) + 1) if edges[place + 1] - edges[place] > 1]


def _objective(kept: list[int], depth: int, adjacent: Iterable[int]) -> Objective:
    """The paper's loss for a student of these teacher layers. `adjacent`: student layers right after a cut."""
    targets = [*kept[:-1], depth]  # the head reads what the last layer makes
    pairs = {j: targets[j - 1] for j in adjacent}
    return Objective(
        outputs=Outputs("forward_kl", temperature=1.0, weight=KL_WEIGHT),
        terms={
            "adjacent": Features("mse", layer_map=LayerMap(pairs.items())),
            "last": Features("mse", layer_map=LayerMap([(len(kept), depth)])),
        },
    )


def _heal(teacher, student, kept, where, data, collator, healing: Healing, removed: int, number: int) -> None:
    """Train the layers beside the cuts, in place."""
    blocks = layers_of(student)
    if healing.steps:
        student.requires_grad_(False)
        for place in where:
            for block in blocks[max(0, place - 1) : place + 1]:
                block.requires_grad_(True)
        # after a cut at the end no layer comes: there it is the last one
        adjacent = sorted({min(place + 1, len(kept)) for place in where})
        objective = _objective(kept, len(layers_of(teacher)), adjacent)
        with tempfile.TemporaryDirectory() as folder:
            arguments = healing.arguments(folder, removed, number, device_of(teacher))
            trainer = DistillationTrainer(
                teacher, student, objective, args=arguments, train_dataset=data, data_collator=collator
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    student.requires_grad_(True).eval()


# -- on the disk ------------------------------------------------------------------------------------------------------


def _write(out: Path, made: Round, settings: dict[str, Any], tokenizer) -> None:
    """A round's folder, under another name until all of it is on the disk."""
    folder, partial = out / f"round-{made.number}", out / f".round-{made.number}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    made.student.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    files = sorted(path for path in partial.iterdir() if path.is_file())
    for path in files:
        sync(path)
    facts = {k: v for k, v in vars(made).items() if k not in ("folder", "student")}
    content = {**facts, "settings": settings, "files": {path.name: sha256(path) for path in files}}
    write_whole(partial / ROUND, json.dumps(content, indent=1, allow_nan=False))
    os.replace(partial, folder)
    sync(out)
    made.folder = folder


def _read(out: Path, settings: dict[str, Any]) -> list[Round]:
    """The finished rounds of a folder.

    Raises:
        ValueError: a round is missing or damaged, or was made with other settings, models or data.
    """
    rounds = []
    found = len(list(out.glob("round-*")))
    for number in range(1, found + 1):
        folder = out / f"round-{number}"
        try:
            content = json.loads((folder / ROUND).read_text(encoding="utf-8"))
            theirs, files = content.pop("settings"), content.pop("files")
            damaged = [name for name, written in files.items() if sha256(folder / name) != written]
            content["importance"] = {int(i): cost for i, cost in content["importance"].items()}
            made = Round(**content, folder=folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} is not whole ({error}); remove it and the rounds after it to make them anew, or choose "
                "another folder."
            ) from error
        if damaged:
            raise ValueError(
                f"{folder} is damaged: {', '.join(damaged)} is not as it was written; remove it and the rounds after "
                "it to make them anew."
            )
        if other := differences({"settings": theirs}, {"settings": settings}):
            lines = "\n".join(
                f"  {key.removeprefix('settings.')}: {a} there, {b} here" for key, (a, b) in other.items()
            )
            raise ValueError(
                f"{out} holds rounds that were made otherwise:\n{lines}\nGo on with what they were made with, or "
                "choose another folder."
            )
        rounds.append(made)
    return rounds


def _load(folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    student = type(teacher).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=teacher.config._attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return student.to(device_of(teacher)).eval()
