"""A small on-policy run with the same global batches in however many processes execute this file: `writers.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fakit.training.on_policy import OnPolicy
from tests.training.runs import logged, parts
from tests.training.test_on_policy import rows, run

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
LOGGED = ("loss", "features", "attention", "outputs", "task", "on_policy/share", "on_policy/tokens", "on_policy/ended")


def main(folder: Path) -> None:
    """Six steps of eight rows, greedy, so that every row's answer is the same whoever writes it."""
    torch.set_num_threads(1)
    # tokens that these models like to write: answers are of several lengths
    settings = OnPolicy(share=0.7, max_new_tokens=6, temperature=0, eos_token_id=(7, 9, 12, 19, 21, 26, 30, 33, 38, 41))
    changes = {"optim": "sgd", "learning_rate": 0.02, "per_device_train_batch_size": 8 // WORLD}
    trainer = run(folder / "run", parts("gpt2"), settings, rows(48), **changes)
    trainer.train()
    mine = folder / f"rank{RANK}"
    mine.mkdir(parents=True)
    seen = {name: logged(trainer, name) for name in LOGGED}
    summary = {name: value for name, value in trainer.written().items() if "second" not in name}
    (mine / "seen.json").write_text(json.dumps({**seen, "summary": summary}))
    save_file(
        {name: p.detach().clone() for name, p in trainer.student.named_parameters()}, mine / "student.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
