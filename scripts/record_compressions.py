"""Compressions of the glosses' teacher, by five paired seeds each: record them in data/recorded/NAME.

    python scripts/record_compressions.py layerwise    # layers taken out one a round, and all in one
    python scripts/record_compressions.py low_rank     # pairs of thin matrices, with 80 % of the parameters

The settings are those of configs/compress_glosses.yaml and configs/compress_glosses_low_rank.yaml. Layers are also
taken out all in one (`layerwise.one_shot: true`): the same depth, the same texts, as many optimizer steps in total.
A seed decides the order of the texts, and which of them carry a label.
Stop it at any time; the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fakit.experiments import RunStore
from fakit.experiments.baselines import prepare_run
from fakit.experiments.compress import CompressConfig, in_words, run_compression

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(5)
# What is asked, the settings, and in what each way differs from them.
RECORDED = {
    "layerwise": (
        "layers taken out one a round, and all in one, at equal depth and steps",
        "compress_glosses.yaml",
        ({}, {"layerwise.one_shot": True}),
    ),
    "low_rank": (
        "pairs of thin matrices with 80 % of the parameters, distilled block by block",
        "compress_glosses_low_rank.yaml",
        ({},),
    ),
}


def planned(name: str, seed: int) -> list[CompressConfig]:
    """Every way of a seed."""
    _, file, ways = RECORDED[name]
    base = CompressConfig.from_yaml(ROOT / "configs" / file).replace(seed=seed)
    return [base.replace(**way) for way in ways]


def main() -> None:
    """Record what is not recorded yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=RECORDED)
    parser.add_argument("--out", type=Path, help="data/recorded/NAME")
    parser.add_argument("--models", type=Path, default=Path("runs/compressions"), help="which may be deleted")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    out = args.out or ROOT / "data/recorded" / args.name
    store = RunStore.open(out, what=RECORDED[args.name][0])
    for seed in SEEDS:
        todo = [config for config in planned(args.name, seed) if not store.has(config.run_id)]
        prepared = prepare_run(todo[0].experiment()) if todo else None
        for config in todo:
            folder = args.models / config.run_id
            record = run_compression(config.replace(out=str(folder)), store, resume=True, prepared=prepared)
            print(in_words(record, folder, out), flush=True)


if __name__ == "__main__":
    main()
