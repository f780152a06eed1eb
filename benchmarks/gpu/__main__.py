"""`make gpu`: every check that needs a GPU, and its report.

Each check ends as passed, failed (with both numbers) or not run (with the reason); the exit status is 1 where one
failed, and 2 where there is no GPU. A GPU's whole report goes to data/recorded/gpu/<card>/, and README.md and
docs/gpu.md say that the card ran; any other to reports/gpu/<card>/.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.gpu import costs, distillation, fused, kernels, losses, machine, pages, planned, report, steps, teachers
from benchmarks.gpu.check import FAILED, Bench, Check, Outcome, run_all
from benchmarks.measure import ROOT

PARTS = (losses, fused, steps, kernels, teachers, costs, planned, distillation)


def all_checks() -> list[Check]:
    """In the order in which they run: what is right before what it costs."""
    return [check for part in PARTS for check in part.checks()]


def chosen(checks: list[Check], only: str | None, without: str | None) -> list[Check]:
    """The checks of some groups, or of names, and without others.

    Raises:
        ValueError: a name that is neither a group nor a check.
    """
    known = {name for check in checks for name in (check.group, check.name)}
    asked = {option: (text or "").split(",") if text else [] for option, text in (("only", only), ("without", without))}
    for option, names in asked.items():
        if unknown := [name for name in names if name not in known]:
            groups = ", ".join(dict.fromkeys(check.group for check in checks))
            raise ValueError(f"--{option} {', '.join(unknown)} is neither a group ({groups}) nor the name of a check.")
    picked = [check for check in checks if not asked["only"] or {check.group, check.name} & set(asked["only"])]
    return [check for check in picked if not {check.group, check.name} & set(asked["without"])]


def main(argv: list[str] | None = None) -> int:
    """Run the checks, print one line each, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto: the first GPU; cuda:1; cpu: what a CPU can run (%(default)s)")
    add("--only", metavar="NAME,…", help="only these groups or checks: losses,costs,forward_kl")
    add("--without", metavar="NAME,…", help="without these groups or checks")
    add("--full", action="store_true", help="sizes of real work on a CPU, too; a GPU takes them anyway")
    add("--small", action="store_true", help="small sizes on a GPU, too: no costs")
    add("--repeats", type=int, default=5, help="turns of each way where seconds are measured (%(default)s)")
    add("--minutes", type=float, default=20, help="begin no check after this long (%(default)s)")
    add("--out", type=Path, help="folder of the reports: data/recorded/gpu of a GPU, reports/gpu of a CPU")
    args = parser.parse_args(argv)
    _quiet()
    checks = chosen(all_checks(), args.only, args.without)
    try:
        device = machine.find_device(args.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    full = args.full or (device.type == "cuda" and not args.small)
    bench, described = Bench(device, full, args.repeats if full else 1), machine.describe(device)
    print(f"{described['card']}: {len(checks)} checks, {'sizes of real work' if full else 'small sizes'}\n", flush=True)
    start, outcomes = time.perf_counter(), []
    for outcome in run_all(checks, bench, args.minutes):
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
    record = report.record_of(described, outcomes, full, time.perf_counter() - start)
    whole = not (args.only or args.without) and full and device.type == "cuda"
    out = args.out or (pages.RECORDED if whole else ROOT / "reports/gpu")
    print(f"\n{report.summary(record)}")
    for path in report.write(out / report.folder_name(described["card"]), record):
        print(path)
    if out == pages.RECORDED:
        for path in pages.write():
            print(path)
    return int(record["counts"][FAILED] > 0)


def _line(outcome: Outcome) -> str:
    said = f"  {outcome.reason}" if outcome.reason else ""
    return f"{outcome.status:8} {outcome.seconds:6.1f} s  {outcome.group}: {outcome.name}{said}"


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
