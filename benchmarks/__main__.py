"""`make bench`: what the kit costs beside a hand-written loop, a floor without alignment, and other libraries, on this machine.

Ways of one row compute the same number, which is checked first. Table, JSON and figure go to reports/bench/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import transformers

from benchmarks.report import conditions, write
from benchmarks.table import ROWS, Table


def main(argv: list[str] | None = None) -> None:
    """Measure, print row by row, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, and nothing else")
    parser.add_argument("--rows", metavar="NAME,…", help=f"only these, of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way in rows of seconds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reports/bench"), help="folder of the report (%(default)s)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    said = conditions(args.quick, args.repeats)
    print(said + "\n")
    results = []
    names = None if args.rows is None else args.rows.split(",")
    for r in Table(args.quick, args.repeats).run(names):
        results.append(r)
        verdict = "reached" if r.reached else "missed"
        print(f"{r.name:13} {r.work}\n{'':13} against {r.against}", flush=True)
        print(
            f"{'':13} {r.ours:.4g} {r.unit} / {r.theirs:.4g} {r.unit} = {r.ratio:.2f}, bar {r.bar:.2f}: {verdict}\n",
            flush=True,
        )
    for path in write(args.out, results, said):
        print(path)


if __name__ == "__main__":
    main()
