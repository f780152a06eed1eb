"""Low rank on the embedded MiniLM teacher of `glosses`: quality, memory, time and size, for docs/compression.md.

    python scripts/measure_low_rank.py quality --texts 1500
    python scripts/measure_low_rank.py stable-ranks --texts 400
    python scripts/measure_low_rank.py memory
    python scripts/measure_low_rank.py epochs --texts 500
    python scripts/measure_low_rank.py speed

Seconds are the processor's, of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fakit import capture
from fakit.compression import low_rank
from fakit.evaluation import evaluate, peak_memory
from fakit.losses.features import l1_cosine
from fakit.tasks import embedded_teacher, load_task

KEEP, MAX_LENGTH, ROWS = 0.8, 48, 32
TRAINING = {"batch_size": ROWS, "max_length": MAX_LENGTH, "learning_rate": 1e-3, "bf16": False}


def timed(work: Callable) -> tuple[object, float]:
    """What it returns, and CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def padded(tokenizer, texts: list[str]) -> list[dict]:
    """Batches of texts of like length."""
    texts = sorted(texts, key=len)
    groups = [texts[i : i + ROWS] for i in range(0, len(texts), ROWS)]
    return [
        dict(tokenizer(group, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"))
        for group in groups
    ]


def end_to_end_step(student, teacher, optimizer, batch: dict) -> float:
    """All layers' hidden states by the same loss, and a step of every trained parameter."""
    layers = range(1, teacher.config.num_hidden_layers + 1)
    with torch.no_grad():
        theirs = capture(teacher, batch, layers, logits=False)
    ours = capture(student, batch, layers, logits=False)
    loss = sum(l1_cosine(ours.hidden_states[i], theirs.hidden_states[i], theirs.mask) for i in layers)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def quality(number: int, epochs: int, rows: int | None, methods: list[str]) -> None:
    """Accuracy of teacher and students on the test split; texts are of the pool, which the teacher never saw."""
    teacher, tokenizer = embedded_teacher("glosses")
    task = load_task("glosses")
    test = task.encode("test", tokenizer, MAX_LENGTH)
    test = test if rows is None else test.shuffle(seed=0).select(range(rows))
    texts = list(task.pool["text"])[:number]

    def score(model) -> float:
        return evaluate(model, test, task.collator(tokenizer), task)["accuracy"]

    full = score(teacher)
    print(f"teacher {full:.3f} on {len(test)} texts; {len(texts)} texts of the pool, {epochs} epochs", flush=True)
    calibration = padded(tokenizer, texts[:400])
    from_weights, seconds = timed(lambda: low_rank.spectra(teacher))
    from_texts, more = timed(lambda: low_rank.spectra(teacher, calibration))
    print(f"spectra: {seconds:.0f} s from weights, {more:.0f} s from {len(texts[:400])} texts", flush=True)
    for start, spectra in (("weights", from_weights), ("activations", from_texts)):
        for method in methods:
            plan, took = timed(lambda spectra=spectra, method=method: low_rank.plan(spectra, KEEP, method))
            student = low_rank.compress(teacher, plan=plan)
            at_start = score(student)
            share = plan.after / plan.before
            print(
                f"{start:11} {method:7} {share:.1%} of {plan.before:,} parameters, planned in {took * 1000:.0f} ms: "
                f"{at_start:.3f} = {at_start / full:.1%} of the teacher's",
                flush=True,
            )
            if start == "weights":
                continue
            results, took = timed(
                lambda student=student: low_rank.distill(student, teacher, texts, tokenizer, epochs=epochs, **TRAINING)
            )
            after = score(student)
            print(
                f"{'':11} {method:7} distilled locally, {len(results)} blocks, {took:.0f} s: {after:.3f} = "
                f"{after / full:.1%}",
                flush=True,
            )


def stable_ranks(number: int) -> None:
    """Of the weights, and of what they give on texts."""
    teacher, tokenizer = embedded_teacher("glosses")
    texts = list(load_task("glosses").pool["text"])[:number]
    rows = low_rank.plan(low_rank.spectra(teacher, padded(tokenizer, texts)), KEEP).rows
    for what in ("stable_rank_weights", "stable_rank_activations"):
        values = sorted(getattr(row, what) for row in rows)
        print(
            f"{what}: median {statistics.median(values):.1f}, {values[0]:.1f} to {values[-1]:.1f}, {len(rows)} weights"
        )


def memory(tokens: int) -> None:
    """Peak bytes of tensors beyond the two models' weights, and CPU seconds of one epoch on the same batches."""
    teacher, _ = embedded_teacher("glosses")
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(1000, 30_000, (ROWS, tokens), generator=generator),
            "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long),
        }
        for _ in range(2)
    ]
    plan = low_rank.plan(teacher, KEEP)

    def end_to_end(only_pairs: bool) -> Callable:
        student = low_rank.compress(teacher, plan=plan)
        pairs = [p for pair in low_rank.pairs(student).values() for p in pair.parameters()]
        trained = pairs if only_pairs else list(student.parameters())
        student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        return lambda: [end_to_end_step(student, teacher, optimizer, batch) for batch in batches]

    def local() -> Callable:
        student = low_rank.compress(teacher, plan=plan)
        return lambda: low_rank.distill(student, teacher, batches, learning_rate=1e-3, bf16=False)

    found = {}
    ways = {"end to end": end_to_end(False), "end to end, pairs alone": end_to_end(True), "local": local()}
    for name, work in ways.items():
        found[name] = peak_memory(work)
        print(f"{name}: {found[name] / 2**20:.0f} MiB beside the weights, {ROWS} × {tokens} tokens", flush=True)
    for name in list(ways)[:2]:
        print(f"local / {name}: {found['local'] / found[name]:.2f}")


def epochs(number: int) -> None:
    """CPU seconds of a local round and of an end-to-end epoch on the same texts."""
    teacher, tokenizer = embedded_teacher("glosses")
    texts = list(load_task("glosses").pool["text"])[:number]
    batches, plan = padded(tokenizer, texts), low_rank.plan(teacher, KEEP)
    student = low_rank.compress(teacher, plan=plan)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    end_to_end_step(student, teacher, optimizer, batches[0])
    _, whole = timed(lambda: [end_to_end_step(student, teacher, optimizer, batch) for batch in batches])
    student = low_rank.compress(teacher, plan=plan)
    results, local = timed(lambda: low_rank.distill(student, teacher, batches, learning_rate=1e-3, bf16=False))
    print(
        f"{len(texts)} texts: a local round of {len(results)} blocks {local:.1f} s, an end-to-end epoch {whole:.1f} s: "
        f"{local / whole:.2f}"
    )


def speed(turns: int) -> None:
    """Size on disk and CPU seconds of a forward pass: the teacher, a student in pairs, and merged."""
    teacher, tokenizer = embedded_teacher("glosses")
    batch = padded(tokenizer, list(load_task("glosses").pool["text"])[:ROWS])[0]
    for keep, method in ((KEEP, "bottom"), (0.7, "uniform")):
        student = low_rank.compress(teacher, keep, method)
        models = {"teacher": teacher, "pairs": student, "merged": low_rank.merge(student)}
        sizes, fastest = {}, dict.fromkeys(models, float("inf"))
        with tempfile.TemporaryDirectory() as folder:
            for name, model in models.items():
                path = Path(folder) / name
                (low_rank.save if name == "pairs" else type(model).save_pretrained)(model, path)
                sizes[name] = next(path.glob("*.safetensors")).stat().st_size / 1e6
            said = {name: capture(model, batch).logits.detach() for name, model in models.items()}
            again = capture(low_rank.load(Path(folder) / "pairs"), batch).logits.detach()
            plain = type(teacher).from_pretrained(Path(folder) / "merged", trust_remote_code=False).eval()
            loaded = capture(plain, batch).logits.detach()
        for _ in range(turns):
            for name, model in models.items():
                with torch.no_grad():
                    fastest[name] = min(fastest[name], timed(lambda model=model: model(**batch))[1])
        print(f"keep={keep}, {method}")
        shape = tuple(batch["input_ids"].shape)
        for name in models:
            print(f"  {name:8} {sizes[name]:.1f} MB, {fastest[name] * 1000:.0f} ms a batch of {shape}")
        largest = said["pairs"].abs().max()
        for what, found in (("loaded pairs", again), ("merged and loaded", loaded)):
            far = (found - said["pairs"]).abs().max()
            print(f"  {what}: logits differ by {far:.1e}, {far / largest:.1e} of the largest")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "stable-ranks", "memory", "epochs", "speed"))
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--methods", default="bottom,uniform,energy")
    parser.add_argument("--rows", type=int, help="of the test split; all unless given")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=8)
    args = parser.parse_args()
    if args.part == "quality":
        quality(args.texts, args.epochs, args.rows, args.methods.split(","))
    elif args.part == "stable-ranks":
        stable_ranks(args.texts)
    elif args.part == "memory":
        memory(args.tokens)
    elif args.part == "epochs":
        epochs(args.texts)
    else:
        speed(args.turns)
