"""Rules on what a run was given: its layer map, its texts, the temperature of its outputs, its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from fakit.experiments.doctor.recorded import Arm, Pairs, Recorded, ends, seeds_of
from fakit.experiments.doctor.rule import Lacking, Rule, Seen
from fakit.layer_maps import LayerMap

PADDING, CUT = 0.5, 0.05
HARD, UNIFORM = 1.05, 0.95
USUAL = (1.0, 20.0)
WARMUP = 0.5

# -- layer maps -------------------------------------------------------------------------------------------------------


def _reversed(pairs: Pairs) -> bool:
    return all(t > u for (_, t), (_, u) in pairwise(pairs))


def _crossing(pairs: Pairs) -> bool:
    return not LayerMap(pairs).is_monotone() and not _reversed(pairs)


def _look_at_maps(wrong: Callable[[Pairs], bool]) -> Callable[[Recorded], Iterator[Seen | Lacking]]:
    def look(recorded: Recorded) -> Iterator[Seen | Lacking]:
        for arm in recorded.arms:
            found = [{n: p for n, p in arm.compared(i).items() if _is_map(p)} for i in range(len(arm.records))]
            bad = [{n: p for n, p in of_run.items() if wrong(p)} for of_run in found]
            if hit := [i for i, of_run in enumerate(bad) if of_run]:
                term, pairs = next(iter(bad[hit[0]].items()))
                of = seeds_of(arm) if len(hit) == len(bad) else f"{len(hit)} of {seeds_of(arm)}"
                yield Seen(arm.task, (arm.name,), f"{term} {_written(pairs)} in {of}{_similarity(arm, pairs)}")
            on = [name for name in ("features", "attention") if name in arm.weights and not arm.maps_nothing(name)]
            if on and not any(arm.compared(i) for i in range(len(arm.records))):
                yield Lacking("the layer pairs that were compared", len(arm.records))

    return look


def _is_map(pairs: Pairs) -> bool:
    """Each student layer has one teacher layer, and there are two student layers or more."""
    students = [s for s, _ in pairs]
    return len(pairs) > 1 and len(set(students)) == len(students)


def _written(pairs: Pairs) -> str:
    return ", ".join(f"S{s}→T{t}" for s, t in pairs)


def _similarity(arm: Arm, pairs: Pairs) -> str:
    if not arm.similarity:
        return ""
    uniform = list(LayerMap.uniform(len(arm.similarity) - 1, len(arm.similarity[0]) - 1).pairs)
    ours, even = (sum(arm.similarity[s][t] for s, t in each) / len(each) for each in (pairs, uniform))
    return f" (mean CKA of its pairs before training {ours:.2f}, of the uniform map's {even:.2f})"


def _off_by_one(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        maps = {key: pairs for key, pairs in arm.typed_maps().items() if len(pairs) > 1}
        if not maps:
            continue
        students, teachers = arm.depths
        if students is None or teachers is None:
            yield Lacking("how deep student and teacher are", len(arm.records))
            continue
        for key, pairs in maps.items():
            if (near := _nearly(pairs, students, teachers)) is not None:
                name, moved = near
                numbers = f"{key} {_written(pairs)}, which is the map `{name}` with {moved}"
                yield Seen(arm.task, (arm.name,), numbers + _similarity(arm, pairs))


def _nearly(pairs: Pairs, students: int, teachers: int) -> tuple[str, str] | None:
    """The strategy that a map is but for a shift by one, and the shift."""
    pairs = sorted(pair for pair in pairs if pair != (0, 0))  # embeddings belong to embeddings
    known = {name: _named(name, students, teachers) for name in ("uniform", "last", "first", "skip", "every", "top")}
    if pairs in known.values():
        return None
    for moved, by in {
        "each teacher layer one too low": (0, 1),
        "each layer one too low on both sides": (1, 1),
        "each student layer one too low": (1, 0),
    }.items():
        shifted = [(s + by[0], t + by[1]) for s, t in pairs]
        for name in ("uniform", "last"):
            if shifted and shifted == known[name]:
                return name, moved
    return None


def _named(name: str, students: int, teachers: int) -> Pairs | None:
    try:
        return sorted(LayerMap.named(name, students, teachers).pairs)
    except ValueError:  # a strategy that these depths do not allow
        return None


# -- texts ------------------------------------------------------------------------------------------------------------


def _padding(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        if not (shares := _of_texts(arm, "padding")):
            yield from _lacks_texts(arm)
        elif (share := sum(shares) / len(shares)) >= PADDING:
            batch = arm.config["training"]["batch_size"]
            yield Seen(arm.task, (arm.name,), f"{share:.0%} of all places in batches of {batch} are padding")


def _cut(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        if not (cuts := _of_texts(arm, "cut")):
            yield from _lacks_texts(arm)
            continue
        cut, texts = (sum(cuts[0].get(split, (0, 0))[i] for split in ("train", "pool")) for i in (0, 1))
        if texts and cut / texts >= CUT:
            length = arm.config["training"]["max_length"]
            numbers = f"{cut:,} of {texts:,} training texts ({cut / texts:.0%}) are longer than max_length {length}"
            yield Seen(arm.task, (arm.name,), numbers)


def _of_texts(arm: Arm, key: str) -> list:
    return [record["texts"][key] for record in arm.records if (record.get("texts") or {}).get(key) is not None]


def _lacks_texts(arm: Arm) -> Iterator[Lacking]:
    if "training" in arm.config:
        yield Lacking("the share of padding and how many texts were cut", len(arm.records))


# -- temperature ------------------------------------------------------------------------------------------------------


def _hard(recorded: Recorded) -> Iterator[Seen | Lacking]:
    yield from _softness(recorded, lambda classes, of: classes <= HARD)


def _uniform(recorded: Recorded) -> Iterator[Seen | Lacking]:
    yield from _softness(recorded, lambda classes, of: classes >= UNIFORM * of)


def _softness(recorded: Recorded, odd: Callable[[float, int], bool]) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        found = arm.records[0].get("softness")
        if found is None:
            if "outputs" in arm.weights and _tau(arm) is not None:
                yield Lacking("how soft the teacher's outputs are at τ", len(arm.records))
            continue
        for name, of_term in found.items():
            if name in arm.weights and odd(of_term["classes"], of_term["of"]):
                numbers = f"{name}: at τ = {of_term['temperature']:.3g} the teacher is as uncertain as between "
                yield Seen(arm.task, (arm.name,), f"{numbers}{of_term['classes']:.2f} of {of_term['of']:,} classes")


def _unusual(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        tau = _tau(arm)
        if arm.records[0].get("softness") is None and "outputs" in arm.weights and tau is not None:
            lowest, top = tau
            if lowest < USUAL[0] or top > USUAL[1]:
                shown = f"{lowest:g}" if lowest == top else f"{lowest:g} to {top:g}"
                yield Seen(arm.task, (arm.name,), f"outputs.temperature is {shown}; entropies were not recorded")


def _tau(arm: Arm) -> tuple[float, float] | None:
    """Lowest and highest temperature of the outputs; None where a loss has none."""
    outputs = arm.config.get("outputs") or {}
    if outputs.get("loss") == "logit_mse" or "temperature" not in outputs:
        return None
    return ends(outputs["temperature"])


# -- learning rate ----------------------------------------------------------------------------------------------------


def _warmup(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        training = arm.config.get("training") or {}
        if training.get("scheduler") == "constant" or not {"warmup", "steps"} <= training.keys():
            continue
        steps, warmup = training["steps"], training["warmup"]
        steps_of_warmup = warmup if warmup >= 1 else math.ceil(warmup * steps)
        if steps > 1 and steps_of_warmup >= WARMUP * steps:
            yield Seen(arm.task, (arm.name,), f"{steps_of_warmup:g} of {steps:,} steps are warm-up")


INTENDED = "If it is a control, as in a study of maps, nothing is wrong."

RULES = (
    Rule(
        "layer map: reversed",
        "warning",
        "of two pairs or more, each deeper student layer learns from a shallower teacher layer",
        "no published map does; it is a control of studies of maps (`LayerMap.reverse`)",
        f"Early layers of the student are asked for what late layers of the teacher hold. {INTENDED}",
        "`layer_map: uniform`, or pairs [student, teacher] that rise together.",
        _look_at_maps(_reversed),
    ),
    Rule(
        "layer map: crossing",
        "warning",
        "some deeper student layer learns from a shallower teacher layer (`LayerMap.is_monotone`)",
        "the order of layers is what both models share; maps that cross are controls (`LayerMap.random`)",
        f"Two student layers learn in the wrong order: often two numbers exchanged. {INTENDED}",
        "Look for exchanged numbers in `layer_map`; the mapping board of notebook 01 draws it.",
        _look_at_maps(_crossing),
    ),
    Rule(
        "layer map: off by one",
        "warning",
        "a map that was typed pair by pair is `uniform` or `last` with every number one too low, on one side or both",
        "lists of hidden states count the embeddings as 0 in transformers, and layers from 0 in a model's own list; "
        "here 0 is the embeddings and 1 the first block",
        f"The last teacher layer, which carries what the head reads, teaches nobody. {INTENDED}",
        "Add 1 to the layer numbers, or name the strategy: `layer_map: uniform`.",
        _off_by_one,
    ),
    Rule(
        "padding",
        "warning",
        f"at least {PADDING:.0%} of the places in the planned batches are padding",
        "then more than half of what the two models compute is thrown away",
        "Batches mix short and long texts, and each is as long as its longest.",
        "A smaller `training.batch_size` with more `accumulation`, a lower `max_length`, or for language models "
        "`packing: true`.",
        _padding,
    ),
    Rule(
        "texts cut",
        "warning",
        f"at least {CUT:.0%} of the training texts are longer than `training.max_length`",
        "one text in twenty: fewer can hardly move a score",
        "The student learns these texts without their ends; of text to text, targets may have no end.",
        "A higher `training.max_length`, as far as the models have positions.",
        _cut,
    ),
    Rule(
        "temperature: hard labels",
        "warning",
        f"at τ the teacher's outputs are as uncertain as between {HARD} classes or fewer (exponential of the mean "
        "entropy)",
        "a teacher that gives its first class 99 % spreads over about 1.05; hard labels over 1",
        "The soft labels are hard labels: what the teacher knows of the other classes (Hinton et al. 2015, "
        "arXiv 1503.02531) is gone.",
        "Raise `outputs.temperature`: notebook 04 shows the teacher's outputs at each τ.",
        _hard,
    ),
    Rule(
        "temperature: uniform",
        "warning",
        f"at τ the teacher's outputs are as uncertain as between {UNIFORM:.0%} of all classes or more (exponential of "
        "the mean entropy)",
        "1 would be a uniform distribution, in which no class is told from another",
        "What is left of a divergence times τ² is a squared difference of logits (Hinton et al. 2015, section 2.1), "
        "of unlikely classes as of likely ones.",
        "Lower `outputs.temperature`, or say what is meant: `outputs: {loss: logit_mse}`.",
        _uniform,
    ),
    Rule(
        "temperature: unusual",
        "warning",
        f"of runs that do not record how soft the teacher was: τ below {USUAL[0]:g} or above {USUAL[1]:g}",
        "Hinton et al. 2015 (arXiv 1503.02531) tried 1 to 20",
        "Below 1 a teacher is harder than it was trained to be; far above, its classes are hardly told apart.",
        "A temperature between 1 and 8, or a new run, which records the entropy.",
        _unusual,
    ),
    Rule(
        "warm-up",
        "warning",
        f"the learning rate rises for at least {WARMUP:.0%} of the steps",
        "usual are 1 to 10 %; from one half on the run is shorter than its warm-up would have it",
        "The learning rate that was asked for is reached late or never, so its value means little.",
        "`training.warmup: 0.1`, or more steps.",
        _warmup,
    ),
)
