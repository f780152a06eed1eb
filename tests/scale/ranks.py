"""Small runs of the trainer, each with the same global batches in however many processes execute this file.

One process takes every global batch of eight rows as it is; under a launcher, `ranks.py FOLDER CONFIG.yaml` shares each
among the processes, and distils CONFIG.yaml, too. Every process writes what it saw to FOLDER/rank0, FOLDER/rank1.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fakit import Attention, DistillationTrainer, Features, Objective, Outputs, Schedule
from fakit.__main__ import main as fakit
from fakit.objective.feature_terms import Dynamics, Flow, Pooled
from fakit.training.distributed import whole_state
from tests.families import batch
from tests.objective.own_term import Contrastive
from tests.training.runs import At, logged, make, parts

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
GLOBAL = 8
_PLAIN = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 1.0}


def uneven(causal: bool, rows: int = 3 * GLOBAL) -> list[dict[str, Tensor]]:
    """Rows of 9 tokens; the first half of each global batch has little padding and many labels,
    the second much and few.
    """
    given = batch(rows, tokens=9, padding=0)
    lengths = torch.tensor([(9, 8, 9, 7), (3, 5, 4, 3)]).flatten().repeat(rows // GLOBAL)
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = given["input_ids"].masked_fill(mask == 0, -100) if causal else (given["input_ids"][:, 0] > 25).long()
    labels[5::GLOBAL] = -100  # unlabeled text
    labels[6::GLOBAL] = -100
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(given["input_ids"] * mask, mask, labels, strict=True)
    ]


def run(
    folder: Path,
    family="bert",
    change=None,
    resume: str | None = None,
    accumulation: int = 1,
    terms=None,
    weights=None,
    balancing=None,
    **settings,
):
    """Three steps over `uneven` rows. `change` is called with the objective after the first step."""
    made = parts(family)
    if terms is not None:
        made = (*made[:2], Objective(made[2].layer_map, Features("mse"), terms=terms, balancing=balancing))
    made[2].weights.update(weights or {})
    trainer = make(
        folder,
        family,
        made=made,
        train=uneven(family == "gpt2"),
        callbacks=[] if change is None else [At(1, made[2], change)],
        per_device_train_batch_size=GLOBAL // WORLD // accumulation,
        gradient_accumulation_steps=accumulation,
        **(_PLAIN | settings),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """Student and projections, whole."""
    whole = whole_state(trainer.model) if trainer.is_fsdp_enabled else trainer.model.state_dict()
    return {name: value.detach().clone().contiguous() for name, value in whole.items()}


def without_heads(objective) -> None:
    """Nothing of the student above its last mapped layer is trained any more."""
    objective.weights.update(outputs=0, task=0)


def only_features(objective) -> None:
    """No attention either, and then no features: what one step trains, the next does not."""
    objective.weights.update(attention=0, outputs=0, task=0)


FOUR = ("loss", "grad_norm", "features", "attention", "outputs", "task", "features/S1_T2", "attention/S2_T3")
OWN = ("loss", "grad_norm", "features", "features/S1_T2")
RUNS = {
    "classifier": {},
    "causal, accumulated": {"family": "gpt2", "accumulation": 2},
    "without heads": {"change": without_heads},
    "only features": {"family": "gpt2", "change": only_features},
    "checkpointed activations": {"activation_checkpointing": True},
    "bf16": {"bf16": True},
    "own term": {"terms": {"contrast": Contrastive(weight=0.5)}},
    "rising": {"weights": {"features": Schedule(0.0, 0.5, "steps", milestones=(1,)), "task": Schedule(1.0, 0.1)}},
    "every kind": {
        "terms": {
            "soft": Outputs("jsd", temperature=1.0, reversal=0.5, temperature_rate=0.05),
            "relations": Attention("relations"),
            "mlp": Features(at="mlp"),
            "texts": Pooled("cosine"),
            "pairs": Features("similarity"),
            "added": Dynamics(),
            "flow": Flow(),
        }
    },
    "uncertainty": {"terms": {"contrast": Contrastive(weight=0.5)}, "balancing": "uncertainty"},
}


def main(folder: Path) -> None:
    """All runs, then a checkpoint, its resumption, an evaluation and an export."""
    torch.set_num_threads(1)
    mine = folder / f"rank{RANK}"
    mine.mkdir(parents=True)
    seen = {}
    for name, settings in RUNS.items():
        trainer = run(folder / name, **settings)
        own = settings.get("terms", {})
        terms = [*OWN, *own, *(["temperature"] if "soft" in own else [])] if own else FOUR
        seen[name] = {term: logged(trainer, term) for term in terms}
        save_file(state(trainer), mine / f"{name}.safetensors")

    saving = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    unbroken = run(folder / "saved", **saving)
    resumed = run(folder / "resumed", resume=str(folder / "saved/checkpoint-2"), **saving)
    for name, trainer in (("unbroken", unbroken), ("resumed", resumed)):
        save_file(state(trainer), mine / f"{name}.safetensors")
    seen["wrapped"] = type(unbroken.model_wrapped).__name__, [type(m).__name__ for m in unbroken.distiller.modules()]
    seen["eval_loss"] = unbroken.evaluate(uneven(causal=False))["eval_loss"]
    unbroken.save_model(str(folder / "exported"))
    whole = unbroken.whole_student().state_dict()
    save_file({name: value.contiguous() for name, value in whole.items()}, mine / "whole.safetensors")
    (mine / "seen.json").write_text(json.dumps(seen))


def distill(folder: Path, config: str) -> int:
    """`fakit distill` in these processes, counting how often each loads a teacher."""
    from fakit.models import load

    load_teacher, loaded = load.load_teacher, []
    load.load_teacher = lambda *args, **kwargs: loaded.append(args) or load_teacher(*args, **kwargs)
    status = fakit(["distill", config, "--out", str(folder / "runs")])
    (folder / f"rank{RANK}/loaded.json").write_text(json.dumps(loaded))
    return status


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.exit(distill(Path(sys.argv[1]), sys.argv[2]))
