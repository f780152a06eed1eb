"""A language model's teacher cache by k and precision: bytes a token, and what of the divergence is kept; for
docs/scaling.md. SmolLM2-135M-Instruct (`make data-llm`) on the shipped instructions, beside a student of 10 layers.

    python scripts/measure_teacher_cache.py --rows 24

Seconds are the processor's, of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from fakit import Objective, Outputs, TeacherCache, load_teacher, shrink
from fakit.losses import outputs
from fakit.losses.top_k import buckets, excess_at_most
from fakit.models.load import load_tokenizer
from fakit.tasks import load_task
from fakit.tracing.capture import capture
from fakit.training.teacher_cache.build import predicting_tokens
from fakit.training.teacher_cache.packing import pack_top_k, unpack_top_k

OBJECTIVE = Objective(outputs=Outputs("forward_kl", temperature=1.0))


def logits_at_answers(model, rows: list[dict]) -> Tensor:
    """(N, V), of the tokens whose next token has a label."""
    found = []
    with torch.no_grad():
        for number, row in enumerate(rows):
            logits = capture(model, {"input_ids": torch.tensor([row["input_ids"]])}).logits[0]
            found.append(logits[predicting_tokens(row, number)])
    return torch.cat(found)


def kept(student: Tensor, teacher: Tensor, k: int) -> None:
    """A line for a k: the mass of the rest, the divergence that is kept, its bound, and the error of each precision."""
    full = outputs.forward_kl(student, teacher).item()

    def joined(dtype: str):
        top = unpack_top_k(pack_top_k(teacher, k, dtype), teacher.shape[-1], (1.0,))
        return outputs.forward_kl(*buckets(student, top)).item(), top

    exact, top = joined("float32")
    errors = {dtype: joined(dtype)[0] / exact - 1 for dtype in ("float16", "bfloat16", "int8")}
    bound = excess_at_most(student, top).mean().item()
    said = ", ".join(f"{dtype} {error:+.1e}" for dtype, error in errors.items())
    print(
        f"k {k}: rest {top.rest_at(1.0).exp().mean():.4f}, KL {exact:.4f} of {full:.4f} ({exact / full:.1%}), "
        f"at most {bound:.3f} beyond; {said}"
    )


def size(teacher, rows: list[dict], k: int | None, dtype: str, tokens: str) -> None:
    """A line for a cache that is built: its files' bytes, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        how = {"top_k": k, "dtype": dtype, "tokens": tokens, "batch_size": 4}
        cache = TeacherCache.build(Path(folder) / "cache", teacher, rows, OBJECTIVE, **how)
        seconds = time.process_time() - start
    answered = sum(int(predicting_tokens(row, number).sum()) for number, row in enumerate(rows))
    everything = sum(len(row["input_ids"]) for row in rows)
    counted = answered if tokens == "labeled" else everything
    print(
        f"k {k}, {dtype}, {tokens}: {cache.bytes:,} bytes, {cache.bytes / counted:,.0f} a token with logits "
        f"({counted:,} of {everything:,}); {seconds / everything * 1000:.1f} ms a token"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    teacher, tokenizer = load_teacher("smollm2"), load_tokenizer("smollm2")
    student = shrink(teacher, layers=10).eval()
    rows = load_task("instructions").encode("train", tokenizer, 192).select(range(args.rows)).to_list()
    theirs, ours = logits_at_answers(teacher, rows), logits_at_answers(student, rows)
    near = theirs + 0.5 * (logits_at_answers(shrink(teacher, layers=29).eval(), rows) - theirs)
    for name, logits in (("10 layers, copied", ours), ("half way to 29 layers", near)):
        print(f"student: {name}, {len(logits)} tokens of answers")
        for k in (8, 16, 20, 32, 50, 64, 128):
            kept(logits, theirs, k)
    for k, dtype, tokens in (
        *((k, "float16", "labeled") for k in (16, 32, 50, 64, 128)),
        (64, "int8", "labeled"),
        (64, "float16", "all"),
        (None, "bfloat16", "labeled"),
    ):
        size(teacher, rows, k, dtype, tokens)


if __name__ == "__main__":
    main()
