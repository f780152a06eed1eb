"""`fakit plan`: its options, and what it does with them. Imports nothing heavy until it is run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options; each is a keyword of `fakit.planner.plan`."""
    add = parser.add_argument
    add("--teacher", required=True, metavar="ID_OR_PATH", help="a folder, a hub id, or a recorded model (Llama-3.1-8B)")
    students = "4: four layers of the teacher's width; 4x1024; or a model of its own (Llama-3.2-1B), as --teacher"
    add("--student", required=True, metavar="LAYERS[xWIDTH]|MODEL", help=students)
    add("--batch", type=int, default=8, metavar="N", help="rows of a batch (%(default)s)")
    add("--seq", type=int, default=512, metavar="T", help="tokens of a row (%(default)s)")
    add("--quantize", choices=("8bit", "4bit"), help="the teacher; not unless given")
    dtypes = "bf16 (mixed precision) or fp32; auto: bf16 on a GPU, on a CPU what this one computes faster (%(default)s)"
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=dtypes)
    add("--memory", default="16GB", help="an amount or a card's name: T4, 'A100 40GB' (%(default)s)")
    tasks = "causal-lm, masked-lm, sequence-classification, seq2seq-lm or encoder"
    add("--task", help=f"{tasks}; guessed from the configuration unless given")
    add("--optimizer", default="adamw", help="adamw, adamw-8bit, adafactor or sgd (%(default)s)")
    add("--checkpointing", action="store_true", help="recompute the student's activations in the backward pass")
    add("--lora", type=int, metavar="RANK", help="train an adapter of this rank in place of the student's weights")
    add("--terms", default="features,attention,outputs,task", help="terms of the objective (%(default)s)")
    add("--tokens", type=float, metavar="N", help="tokens to train on, for the time of the whole: 1e8")
    add(
        "--utilization",
        "--utilisation",
        type=float,
        default=0.4,
        help="share of a card's FLOP/s that is reached (%(default)s)",
    )
    add("--device", choices=("gpu", "cpu"), default="gpu", help="whose kernels and block sizes (%(default)s)")
    add("--figure", type=Path, metavar="FILE", help="write the figure: .svg, .png or .html")


def print_plan(args: argparse.Namespace) -> int:
    """Print the plan; 0 where it fits, 1 where it does not."""
    import transformers

    from fakit.planner.planning import plan

    transformers.logging.set_verbosity_error()
    if args.figure is not None:
        from fakit.figures.figure import check_path

        check_path(args.figure)
    options = {name: value for name, value in vars(args).items() if name not in ("function", "debug", "figure")}
    options["terms"] = [term for term in options["terms"].split(",") if term]
    found = plan(options.pop("teacher"), options.pop("student"), **options)
    print(found)
    if args.figure is not None:
        print(found.figure().save(args.figure))
    return 0 if found.fits else 1
