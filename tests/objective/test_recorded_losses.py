"""The same seeds give the same losses as before the terms became objects: five objectives, three families,
live and cached.

The numbers beside this file were recorded with the code before the move (commit 4c71735), in float64:
`python -m tests.objective.test_recorded_losses` writes them.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture, shrink
from tests.families import batch, tiny

RECORDED = Path(__file__).with_name("recorded_losses.json")
STEPS, ROWS = 4, 6
MAP = LayerMap([(1, 1), (2, 3)], weights=[1, 3])
OBJECTIVES = {
    "all four": lambda: Objective(
        LayerMap.uniform(2, 3),
        Features("mse", weight=0.5),
        Attention("kl", weight=2.0),
        Outputs("forward_kl", temperature=2.0, weight=1.5),
        Task(weight=0.7),
    ),
    "best match": lambda: Objective(
        MAP, attention=Attention("mse", heads="best-match"), outputs=Outputs("jsd", temperature=1.0)
    ),
    "relations": lambda: Objective(
        LayerMap([(2, 3)]), attention=Attention("relations"), outputs=Outputs("reverse_kl"), task=Task()
    ),
    "a map for each": lambda: Objective(
        features=Features("cosine", layer_map=LayerMap([(0, 0), (2, 2)])),
        attention=Attention("kl", layer_map=MAP),
        outputs=Outputs("logit_mse"),
    ),
    "random map": lambda: Objective(
        LayerMap.random(2, 3, seed=5), Features("normalized_mse"), outputs=Outputs(), task=Task()
    ),
}
FAMILIES = {"bert": 16, "gpt2": 32, "bart": 32}  # and the student's width


def losses(family: str, name: str, folder: Path | None) -> list[dict[str, float]]:
    """Terms of a few steps of a student that is trained by AdamW; from a cache where there is a folder."""
    teacher = tiny(family).eval().requires_grad_(False)
    torch.manual_seed(1)
    narrow = FAMILIES[family] if OBJECTIVES[name]().attention is None else 32
    student = shrink(teacher, 2, hidden_size=narrow).double()
    torch.manual_seed(2)
    objective = OBJECTIVES[name]().prepare(narrow, 32).double()
    data = batch(ROWS)
    data["labels"] = data["input_ids"].clone() if family != "bert" else data["input_ids"][:, 0] % 2
    cache = None
    if folder is not None:
        keys = ("input_ids", "attention_mask")
        rows = [{key: data[key][i] for key in keys} for i in range(ROWS)]
        cache = TeacherCache.build(folder, teacher, rows, objective, dtype="float32")
    teacher = teacher.double()
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-3)
    found = []
    for step in range(STEPS):
        objective.set_epoch(step)
        needs = objective.needs("teacher")
        if cache is None:
            with torch.no_grad():
                theirs = capture(teacher, data, needs.hidden_states, needs.attentions, needs.capture_logits)
        else:
            theirs = cache.trace(list(range(ROWS)), data["attention_mask"].bool(), needs, torch.device("cpu"))
        needs = objective.needs("student")
        ours = capture(student, data, needs.hidden_states, needs.attentions, needs.capture_logits)
        loss = objective(ours, theirs, data["labels"])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        found.append({"total": loss.total.item(), **{term: value.item() for term, value in loss.terms.items()}})
    return found


CASES = [(family, name, cached) for family in FAMILIES for name in OBJECTIVES for cached in (False, True)]
CASES = [case for case in CASES if not (case[0] == "bart" and case[2])]  # its rows would need labels for its decoder


@pytest.mark.parametrize(("family", "name", "cached"), CASES)
def test_losses_are_those_of_before(family, name, cached, tmp_path):
    now = losses(family, name, tmp_path / "cache" if cached else None)
    before = json.loads(RECORDED.read_text())[f"{family}, {name}, {'cached' if cached else 'live'}"]
    for step, (one, other) in enumerate(zip(now, before, strict=True)):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9), step


if __name__ == "__main__":
    import tempfile

    recorded = {}
    for family, name, cached in CASES:
        with tempfile.TemporaryDirectory() as folder:
            key = f"{family}, {name}, {'cached' if cached else 'live'}"
            recorded[key] = losses(family, name, Path(folder) / "cache" if cached else None)
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    sys.stdout.write(f"{len(recorded)} cases written to {RECORDED.name}\n")
