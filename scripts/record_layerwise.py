"""Layers taken out one a round, or all in one: record both on glosses, by paired seeds, in data/recorded/layerwise.

    python scripts/record_layerwise.py

Both are configs/compress_glosses.yaml, the second with `layerwise.one_shot: true`: the same depth, the same texts, as
many optimizer steps in total. A seed decides the order of the texts, and which of them carry a label, for both alike.
Stop it at any time; the same command goes on from the last finished round.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fakit.experiments import RunStore
from fakit.experiments.baselines import prepare_run
from fakit.experiments.compress import CompressConfig, in_words, run_compression

ROOT = Path(__file__).resolve().parents[1]
WHAT = "layers taken out one a round, and all in one, at equal depth and steps"
SEEDS = range(5)


def planned(seed: int) -> list[CompressConfig]:
    """Both ways of a seed."""
    base = CompressConfig.from_yaml(ROOT / "configs/compress_glosses.yaml").replace(seed=seed)
    return [base, base.replace(**{"layerwise.one_shot": True})]


def main() -> None:
    """Record what is not recorded yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data/recorded/layerwise")
    parser.add_argument("--rounds", type=Path, default=Path("runs/layerwise"), help="the models, which may be deleted")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    store = RunStore.open(args.out, what=WHAT)
    for seed in SEEDS:
        todo = [config for config in planned(seed) if not store.has(config.run_id)]
        prepared = prepare_run(todo[0].experiment()) if todo else None
        for config in todo:
            folder = args.rounds / config.run_id
            record = run_compression(config.replace(out=str(folder)), store, resume=True, prepared=prepared)
            print(in_words(record, folder, args.out), flush=True)


if __name__ == "__main__":
    main()
