"""`make bench`: what the kit costs beside a hand-written loop, a floor without alignment, and other libraries,
on this machine.

Ways of one row compute the same number, which is checked first. Table, JSON and figure go to reports/bench/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import transformers

from benchmarks.peers.environments import PEERS
from benchmarks.report import conditions, peers_markdown, write
from benchmarks.table import ROWS, Table


def main(argv: list[str] | None = None) -> None:
    """Measure, print row by row, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, and nothing else")
    parser.add_argument("--rows", metavar="NAME,…", help=f"only these, of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way in rows of seconds (%(default)s)")
    parser.add_argument(
        "--peers",
        metavar="NAME,…",
        help=f"beside these, of {', '.join(PEERS)}; none with --quick or --rows unless named",
    )
    parser.add_argument("--out", type=Path, default=Path("reports/bench"), help="folder of the report (%(default)s)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = [] if args.quick or args.rows is not None else list(PEERS)
    if args.peers is not None:
        chosen = [name for name in args.peers.split(",") if name]
        if unknown := [name for name in chosen if name not in PEERS]:
            raise ValueError(f"no peer is called {', '.join(unknown)}; the peers are {', '.join(PEERS)}.")
    said = conditions(args.quick, args.repeats)
    print(said + "\n")
    results = []
    names = None if args.rows is None else [name for name in args.rows.split(",") if name]
    table = Table(args.quick, args.repeats)
    for r in table.run(names):
        results.append(r)
        verdict = "reached" if r.reached else "missed"
        print(f"{r.name:13} {r.work}\n{'':13} against {r.against}", flush=True)
        print(
            f"{'':13} {r.ours:.4g} {r.unit} / {r.theirs:.4g} {r.unit} = {r.ratio:.2f}, bar {r.bar:.2f}: {verdict}\n",
            flush=True,
        )
    peers = []
    for peer in table.beside_peers(chosen):
        peers.append(peer)
        print(peers_markdown([peer]).splitlines()[-1], flush=True)
    for path in write(args.out, results, said, peers):
        print(path)


if __name__ == "__main__":
    main()
