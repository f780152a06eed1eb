"""What leads the total of a language model's objective: shares by term, by layer and by token, for
docs/instruction_data.md. SmolLM2-135M-Instruct (`make data-llm`) on the shipped instructions, beside a student of 10 of
its layers, before the first step.

    python scripts/measure_shares.py --rows 16
"""

from __future__ import annotations

import argparse
import logging

import torch

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, load_teacher, shrink
from fakit.models.load import load_tokenizer
from fakit.tasks import load_task
from fakit.tracing.capture import capture

LOSSES = ("mse", "layernorm_mse", "cosine")
TOKENS = ("all", "later", "labeled")
LAYERS = (10, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="of the test split")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    asked = parser.parse_args()
    teacher, tokenizer = load_teacher("smollm2", task="causal-lm"), load_tokenizer("smollm2")
    student = shrink(teacher, LAYERS[0]).eval()
    task = load_task("instructions")
    rows = task.encode("test", tokenizer, 192).select(range(asked.rows)).to_list()
    batch = task.collator(tokenizer)(rows)
    layer_map = LayerMap.uniform(*LAYERS)
    pairs = list(layer_map.pairs)
    with torch.no_grad():
        theirs = capture(teacher, batch, [t for _, t in pairs], [t for _, t in pairs])
        ours = capture(student, batch, [s for s, _ in pairs], [s for s, _ in pairs])
    words = int(batch["attention_mask"].sum())
    print(f"{asked.rows} rows, {words:,} tokens, {int((batch['labels'] != -100).sum()):,} of them labeled\n")
    print("| features | tokens | features | attention | outputs | task | largest layer | first tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for loss in LOSSES:
        whole = None
        for tokens in TOKENS:
            objective = Objective(
                layer_map,
                Features(loss, tokens=tokens),
                Attention("kl", heads="group-mean"),
                Outputs("forward_kl", temperature=1.0),
                Task(),
            )
            with torch.no_grad():
                found = objective(ours, theirs, batch["labels"])
            shares = {name: float(value / found.total) for name, value in found.weighted.items()}
            by_layer = {pair: float(value) for pair, value in found.per_layer["features"].items()}
            (_, leading), most = max(by_layer.items(), key=lambda item: item[1])
            value = float(found.terms["features"])
            whole = value if tokens == "all" else whole
            first = "–"
            if tokens == "later":  # a mean over tokens: what goes with the first ones of all rows
                first = f"{100 * (1 - value * (words - len(rows)) / (whole * words)):.1f} %"
            cells = [f"{100 * shares[name]:.1f} %" for name in ("features", "attention", "outputs", "task")]
            layer = f"{100 * most / sum(by_layer.values()):.0f} % (T{leading})"
            print(f"| {loss} | {tokens} | {' | '.join(cells)} | {layer} | {first} |")


if __name__ == "__main__":
    main()
