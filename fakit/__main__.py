"""The commands: `fakit run`, `distill`, `cache`, `compress`, `study`, `evaluate`, `plan` and `report`;
each calls the function that a notebook would call.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Unable to allocate|bad_alloc|bad allocation", re.IGNORECASE
)
_NO_SPACE = re.compile(
    r"No space left on device|PytorchStreamWriter failed|os error 28|Disk quota exceeded", re.IGNORECASE
)
MEMORY = (
    "the memory is used up: {said} Lower training.batch_size (and raise training.accumulation by as much), "
    "training.max_length or the student's size, or give teacher.quantize; `fakit plan` says beforehand what fits."
)
DISK = (
    "the disk is full{where}: free space, or name another folder (--out, out:); with training.save_every set, --resume "
    "goes on from the last whole checkpoint."
)


def run(args: argparse.Namespace) -> int:
    """`fakit run`: execute the notebook sequence and write its pages."""
    from fakit.teaching.runner import exit_status, run_notebooks

    return exit_status(run_notebooks(args.notebooks, args.out, args.profile, only=args.only, jobs=args.jobs))


def distill(args: argparse.Namespace) -> int:
    """`fakit distill`: one experiment, from its YAML file to an exported student and a record."""
    from fakit.experiments import ExperimentConfig, run_experiment
    from fakit.experiments.schema import settings
    from fakit.training.distributed import end_with_parent, start_all_processes

    config = ExperimentConfig.from_yaml(args.config)  # what is wrong in it is said once, not by every process
    config = config.replace(**settings(args.set))
    start_all_processes()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of several: without their launcher nobody would end them
        end_with_parent()
    if config.out is None:  # the run id does not depend on `out`, so --resume finds the folder again
        config = config.replace(out=str(args.out / config.run_id))
    cached = {name: getattr(args, name) for name in ("teacher_cache", "cache_dtype", "cache_top_k", "cache_rows")}
    result = run_experiment(config, store=args.out, resume=args.resume, **cached)
    if os.environ.get("RANK", "0") == "0":  # `accelerate launch` starts one process a device
        print(result)
        print(f"The student is in {config.out}, the run in {args.out}; `fakit report {args.out}` compares its runs.")
    return 0


def cache(args: argparse.Namespace) -> int:
    """`fakit cache`: the teacher cache of one experiment, built without training, or only its size."""
    from fakit.experiments import ExperimentConfig
    from fakit.experiments.run import cache_experiment
    from fakit.experiments.schema import settings

    config = ExperimentConfig.from_yaml(args.config).replace(**settings(args.set))
    folder = None if args.teacher_cache is None else str(args.teacher_cache)
    how = {"folder": folder, "dtype": args.cache_dtype, "top_k": args.cache_top_k, "rows": args.cache_rows}
    found = cache_experiment(config, plan=args.plan, **how)
    if args.plan:
        print(found)
        return 0
    size = sum(path.stat().st_size for path in found.folder.glob("*.safetensors"))
    print(f"The teacher cache {found.folder} holds {len(found):,} rows in {size:,} bytes; `fakit distill` reads it.")
    return 0


def compress(args: argparse.Namespace) -> int:
    """`fakit compress`: a smaller model from a teacher, from its YAML file to an exported student and a record."""
    from fakit.experiments.compress import CompressConfig, in_words, run_compression
    from fakit.experiments.schema import settings

    config = CompressConfig.from_yaml(args.config).replace(**settings(args.set))
    record = run_compression(config, args.out, resume=args.resume)
    print(in_words(record, config.out or args.out / config.run_id, args.out))
    return 0


def study(args: argparse.Namespace) -> int:
    """`fakit study`: run what a study has not recorded yet."""
    from fakit.experiments import Study

    store = Study.from_yaml(args.config).run(args.out, workers=args.workers)
    print(f"{len(store)} runs are recorded in {store.path}; `fakit report {store.path}` compares them.")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`fakit evaluate`: a saved model beside its teacher."""
    from fakit.experiments.measured import FILE, configuration_of, measure
    from fakit.experiments.schema import settings

    config = configuration_of(args.folder, args.config).replace(**settings(args.set))
    print(measure(args.folder, config, split=args.split, rows=args.rows, draft=args.draft))
    print(f"\nWritten to {args.folder / FILE}.")
    return 0


def generate(args: argparse.Namespace) -> int:
    """`fakit generate`: what a saved language model answers, beside its teacher where asked for."""
    from fakit.experiments.written import answers

    answers(
        args.folder,
        args.prompt,
        args.file,
        beside=args.beside,
        out=args.out,
        template=args.template,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    return 0


def plan(args: argparse.Namespace) -> int:
    """`fakit plan`: memory and time of a step, from configurations alone; 1 where it does not fit."""
    from fakit.planner.command import print_plan

    return print_plan(args)


def report(args: argparse.Namespace) -> int:
    """`fakit report`: tables and figures of a runs directory."""
    from fakit.experiments import report

    print(report(args.runs, args.out, args.baseline))
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options; each command's function is in `args.function`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (also FAKIT_TRACEBACK=1)")
    top = argparse.ArgumentParser(prog="fakit", description="Feature-alignment distillation of transformer models.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, parents=[common], help=help, description=help)
        added.set_defaults(function=function)
        return added

    def of_a_file(function, help: str, example: str, resume: str) -> argparse.ArgumentParser:
        added = command(function, help)
        added.add_argument("config", type=Path, metavar="CONFIG.yaml")
        added.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"change any key of CONFIG.yaml, as often as needed: {example}",
        )
        added.add_argument("--resume", action="store_true", help=f"go on from {resume}")
        added.add_argument("--out", type=Path, default=Path("runs"), help="the runs directory (%(default)s)")
        return added

    def cache_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--teacher-cache",
            type=Path,
            metavar="DIR",
            help="let the teacher answer each text once, into DIR, and read it from there",
        )
        sub.add_argument(
            "--cache-dtype",
            choices=["float32", "bfloat16", "float16", "int8"],
            help="its precision (bfloat16)",
        )
        sub.add_argument(
            "--cache-top-k", type=int, metavar="K", help="only the K largest logits, and the mass of the rest"
        )
        sub.add_argument(
            "--cache-rows",
            choices=["planned", "all"],
            help="the texts that this run's steps see, or all of them, for runs of other plans (planned)",
        )

    sub = command(run, "Execute the notebooks and write them as HTML pages.")
    sub.add_argument("--profile", default="quick", help="quick, workshop or full: how long they train (%(default)s)")
    sub.add_argument("--only", metavar="02,05", help="these notebooks, by number or name; all by default")
    sub.add_argument("--out", type=Path, default=Path("reports"), help="where the pages go (%(default)s)")
    sub.add_argument("--jobs", type=int, default=2, help="notebooks side by side (%(default)s)")
    sub.add_argument("--notebooks", type=Path, metavar="FOLDER", help="where they are; the kit's own by default")

    sub = of_a_file(
        distill,
        "Train, evaluate, export and record the student of one experiment.",
        example="--set training.steps=50 --set features.weight=0.3",
        resume="the last checkpoint (training.save_every)",
    )
    cache_options(sub)

    sub = command(cache, "Build the teacher cache of one experiment, without training; what is finished of it stays.")
    sub.add_argument("config", type=Path, metavar="CONFIG.yaml")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of CONFIG.yaml")
    sub.add_argument("--plan", action="store_true", help="say what it would take, and build nothing")
    cache_options(sub)

    of_a_file(
        compress,
        "Make a smaller model from a teacher, evaluate, export and record it.",
        example="--set layerwise.layers=2",
        resume="the rounds that are finished",
    )

    sub = command(study, "Run the experiments of a study that are not recorded yet.")
    sub.add_argument("config", type=Path, metavar="STUDY.yaml")
    sub.add_argument("--out", type=Path, default=Path("runs/study"), help="the runs directory (%(default)s)")
    sub.add_argument("--workers", type=int, default=1, help="processes side by side (%(default)s)")

    sub = command(evaluate, "Score a saved model beside its teacher: metrics, speed, samples.")
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="task and teacher (FOLDER/experiment.yaml)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of it")
    sub.add_argument("--split", default="test", help="test or validation (%(default)s)")
    sub.add_argument("--rows", type=int, metavar="N", help="the first so many rows; all by default")
    sub.add_argument("--draft", type=int, metavar="TOKENS", help="also as a draft that proposes so many tokens")

    sub = command(generate, "Let a saved language model answer prompts.")
    sub.add_argument("folder", metavar="MODEL", help="a folder, a hub id or smollm2")
    sub.add_argument("prompt", nargs="*", help="prompts, each in quotes")
    sub.add_argument("--file", type=Path, metavar="FILE", help="further prompts: one a line, or a .jsonl with 'prompt'")
    sub.add_argument("--beside", metavar="MODEL", help="another model, such as the teacher, that answers the same")
    sub.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the answers there, too")
    sub.add_argument("--template", default="auto", help="auto: the chat template; none; or '…{prompt}…' (%(default)s)")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="cut there (%(default)s)")
    sub.add_argument("--temperature", type=float, metavar="T", help="sample at it; greedy unless given")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")

    from fakit.planner.command import add_options

    add_options(command(plan, "Will it fit, and how long will it take? Memory and FLOPs from configurations alone."))

    sub = command(report, "Compare recorded runs: tables and figures.")
    sub.add_argument("runs", type=Path, metavar="RUNS_DIR")
    sub.add_argument("--out", type=Path, help="where the report goes (RUNS_DIR/report)")
    sub.add_argument(
        "--baseline",
        action="append",
        metavar="ARM",
        help="an arm that gains are paired against, as often as needed (none and outputs)",
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        its exit status: 1 a notebook failed or a plan does not fit, 2 something asked for cannot be done,
        130 stopped by Ctrl-C.

    Raises:
        Exception: what nobody foresaw, with its traceback: a bug. With --debug (or FAKIT_TRACEBACK=1) every error.
    """
    args = parser().parse_args(argv)
    shown = args.debug or os.environ.get("FAKIT_TRACEBACK", "") not in ("", "0")
    try:
        return args.function(args)
    except BrokenPipeError:  # `fakit … | head`: whoever read has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if shown:
            raise
        _say("stopped by Ctrl-C. What was recorded stays; a run with training.save_every goes on with --resume.")
        return 130
    except Exception as error:
        said = None if shown else in_a_sentence(error)
        if said is None:
            if not shown:
                error.add_note("fakit did not foresee this error: please report it, with the lines above.")
            raise
        _say(said)
        return 2


def _say(sentence: str) -> None:
    """One line on stderr; of several processes each says which it is."""
    rank = os.environ.get("RANK", "0")
    print(f"fakit: {sentence}" if rank == "0" else f"fakit (process {rank}): {sentence}", file=sys.stderr)


# -- what an error is answered with: a sentence for an input or a machine that does not do, nothing for a bug


def in_a_sentence(error: BaseException) -> str | None:
    """The sentence for an error, notes included; None for one that nobody foresaw: a bug,
    to be shown with its traceback.
    """
    said = _said(error)
    if said is None:
        return None
    return "\n".join([said, *getattr(error, "__notes__", [])])


def _said(error: BaseException) -> str | None:
    text = str(error)
    # the message of a library that met the full disk or memory first; both may stand below an error of another kind
    if isinstance(error, MemoryError) or (_OUT_OF_MEMORY.search(text) and not isinstance(error, ValueError)):
        return MEMORY.format(said=_first_line(text))
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(text):
        file = getattr(error, "filename", None)
        return DISK.format(where=f" ({file})" if file else "")
    if isinstance(error, ValueError):
        return text
    if isinstance(error, OSError):
        if error.strerror and error.filename:
            return f"{error.strerror}: {error.filename}"
        return _safe(error) if text else f"the system refused a file ({type(error).__name__})."
    if isinstance(error, ImportError) and "pip install" in text:  # of an extra
        return text
    if isinstance(error, ImportError) and error.name and not error.name.startswith("fakit"):
        return (
            f"the package {error.name!r} is needed for this and not installed: pip install {error.name.split('.')[0]}."
        )
    if type(error).__name__ == "BrokenProcessPool":
        return (
            "a worker process ended without a word, as where the system kills one that takes too much memory; lower "
            "--workers. What is recorded stays, and the same command goes on from there."
        )
    return None


def _first_line(text: str) -> str:
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
    return f"{line[:200].rstrip('.')}." if line else ""


def _safe(error: BaseException) -> str:
    from fakit.models.pretrained import first_sentence

    return first_sentence(error)


if __name__ == "__main__":
    sys.exit(main())
