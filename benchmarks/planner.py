"""What the planner says beside what a training step takes: peak resident memory of a fresh process,
and torch's count of FLOPs.

python -m benchmarks.planner                          every case; the table goes to reports/bench/planner.md, too
python -m benchmarks.planner --only base,llama        these
python -m benchmarks.planner --case base              one case measured in this process; prints JSON
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.measure import _resident, run_json
from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture, load_teacher, shrink
from fakit.evaluation.cost import count_flops
from fakit.planner import Plan, plan

AUTO = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Case:
    """A teacher's configuration, and the keywords of `fakit.planner.plan`."""

    model: str
    teacher_layers: int
    student: str
    batch: int
    seq: int
    options: dict = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        """The teacher's."""
        kind, values = MODELS[self.model]
        depth = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
        return AutoConfig.for_model(kind, **values, **{depth: self.teacher_layers})


MODELS: dict[str, tuple[str, dict]] = {
    "BERT 384": ("bert", dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536)),
    "BERT 768": ("bert", {}),
    "GPT-2 768": ("gpt2", {}),
    "Llama 1024": (
        "llama",
        dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_attention_heads=16,
            num_key_value_heads=4,
            vocab_size=32_000,
        ),
    ),
    "Qwen 896": (
        "qwen2",
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
            tie_word_embeddings=True,
        ),
    ),
}
MASKED, CAUSAL, CLASSES = {"task": "masked-lm"}, {"task": "causal-lm"}, {"task": "sequence-classification"}
CASES = {
    "small": Case("BERT 384", 2, "1", 8, 64, MASKED),
    "base": Case("BERT 384", 6, "3", 16, 128, MASKED),
    "layers": Case("BERT 384", 12, "6", 16, 128, MASKED),
    "width": Case("BERT 768", 6, "3x384", 16, 128, MASKED),
    "batch": Case("BERT 384", 6, "3", 64, 128, MASKED),
    "length": Case("BERT 384", 6, "3", 4, 512, MASKED),
    "checkpointing": Case("BERT 384", 12, "12", 8, 256, CLASSES | {"checkpointing": True}),
    "no checkpointing": Case("BERT 384", 12, "12", 8, 256, CLASSES),
    "bf16": Case("BERT 768", 12, "6", 16, 128, MASKED | {"dtype": "bf16"}),
    "gpt2": Case("GPT-2 768", 12, "6", 4, 256, CAUSAL),
    "8bit": Case("GPT-2 768", 12, "6", 4, 256, CAUSAL | {"quantize": "8bit"}),
    "4bit": Case("GPT-2 768", 12, "6", 4, 256, CAUSAL | {"quantize": "4bit"}),
    "llama": Case("Llama 1024", 8, "4", 4, 512, CAUSAL),
    "llama 8bit": Case("Llama 1024", 16, "4", 4, 256, CAUSAL | {"quantize": "8bit"}),
    "llama 4bit bf16": Case("Llama 1024", 16, "4x512", 2, 512, CAUSAL | {"quantize": "4bit", "dtype": "bf16"}),
    "qwen": Case("Qwen 896", 6, "3", 2, 512, CAUSAL),
    "without outputs": Case("BERT 384", 12, "4", 32, 128, MASKED | {"terms": ("features", "attention")}),
    "sgd": Case("BERT 768", 12, "4", 8, 128, MASKED | {"optimizer": "sgd"}),
}


def measure(name: str) -> dict[str, float]:
    """{"bytes", "flops"} of a step.

    Bytes: the peak of resident memory over a second training step, optimizer included, above what the process had
    before any model was made. FLOPs by torch's counter; NaN with a quantized teacher, whose kernels it does not see.
    """
    case = CASES[name]
    _warm_up(case)
    gc.collect()
    baseline = _resident("VmRSS")
    run = Run(case)
    for step in range(2):
        gc.collect()
        if step:
            Path("/proc/self/clear_refs").write_text("5")
        run.step()
    measured = 1024 * (_resident("VmHWM") - baseline)
    flops = math.nan
    if not run.options.get("quantize"):
        run.batch["attention_mask"].fill_(1)  # every position counts, as in a plan
        flops = count_flops(run.forward_and_backward)
    return {"bytes": measured, "flops": flops}


class Run:
    """A case's models, optimizer and batch on a device, and its training step."""

    def __init__(self, case: Case, device: str = "cpu"):
        self.options = {"dtype": "fp32", "terms": ("features", "attention", "outputs", "task")} | case.options
        self.device = torch.device(device)
        torch.manual_seed(0)
        self.teacher, self.student = _models(case, self.options, device)
        self.objective = _objective(self.options["terms"], self.teacher, self.student).to(device)
        trained = [*self.student.parameters(), *self.objective.parameters()]
        make = {"adamw": lambda p: torch.optim.AdamW(p, fused=True), "sgd": torch.optim.SGD}
        self.optimizer = make[self.options.get("optimizer", "adamw")](trained)
        self.batch = {key: value.to(device) for key, value in _batch(case, self.options["task"]).items()}

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.forward_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_and_backward(self) -> None:
        """Without the optimizer."""
        mixed = self.options["dtype"] == "bf16"
        _step(self.teacher, self.student, self.objective, self.batch, mixed, self.device.type)


def _step(teacher, student, objective, batch, mixed: bool, device: str) -> None:
    given, needs = objective.needs("teacher"), objective.needs("student")
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        with torch.no_grad():
            theirs = capture(teacher, batch, given.hidden_states, given.attentions, given.capture_logits)
        ours = capture(student, batch, needs.hidden_states, needs.attentions, needs.capture_logits)
        total = objective(ours, theirs, batch["labels"]).total
    del theirs, ours
    total.backward()


def _models(case: Case, options: dict, device: str):
    config, task = case.config(), options["task"]
    dtype = torch.bfloat16 if options["dtype"] == "bf16" else torch.float32
    teacher = (
        AUTO[task]
        .from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
        .eval()
        .requires_grad_(False)
    )
    layers, _, width = case.student.partition("x")
    student = shrink(teacher, int(layers), int(width) if width else None)
    if options.get("checkpointing"):
        student.config.use_cache = False
        student.activation_checkpointing_enable()
    if options.get("quantize"):
        with tempfile.TemporaryDirectory() as folder:
            teacher.save_pretrained(folder)
            del teacher
            gc.collect()
            teacher = load_teacher(folder, task, options["quantize"], dtype=dtype, device=device)
        for tensor in [
            *teacher.parameters(),
            *teacher.buffers(),
        ]:  # what is not quantized is the mapped file itself: let it go
            tensor.data = tensor.data.clone()
    return teacher if options.get("quantize") else teacher.to(device), student.to(device)


def _objective(terms: tuple[str, ...], teacher, student) -> Objective:
    ours, theirs = student.config, teacher.config
    heads = "one-to-one" if ours.num_attention_heads == theirs.num_attention_heads else "group-mean"
    every = {
        "features": Features("mse"),
        "attention": Attention("kl", heads=heads),
        "outputs": Outputs("forward_kl", temperature=2.0),
        "task": Task(),
    }
    layer_map = LayerMap.uniform(ours.num_hidden_layers, theirs.num_hidden_layers)
    objective = Objective(layer_map, **{name: every[name] for name in terms})
    return objective.prepare(ours.hidden_size, theirs.hidden_size)


def _batch(case: Case, task: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20_000, (case.batch, case.seq))
    mask = torch.ones_like(ids)
    mask[-1, -case.seq // 4 :] = 0  # padding, as batches have
    labels = torch.zeros(case.batch, dtype=torch.long) if task == "sequence-classification" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _warm_up(case: Case) -> None:
    """A step of tiny models: libraries are loaded and threads started before anything is measured."""
    kind = {"causal-lm": "gpt2", "masked-lm": "bert", "sequence-classification": "bert"}[case.options["task"]]
    small = {
        "gpt2": dict(n_embd=32, n_head=2),
        "bert": dict(hidden_size=32, num_attention_heads=2, intermediate_size=64),
    }
    MODELS["warm up"] = (kind, small[kind])
    Run(Case("warm up", 2, "1", 2, 16, case.options | {"optimizer": "adamw"})).step()


def predict(name: str, device: str = "cpu") -> Plan:
    """The plan of a case from its configuration, for the CPU or a GPU."""
    case = CASES[name]
    return plan(case.config(), case.student, case.batch, case.seq, device=device, **{"dtype": "fp32"} | case.options)


def row(name: str) -> str:
    """One line of the table: planned, measured, and by how much the plan is off."""
    found = predict(name)
    measured = run_json([sys.executable, "-m", "benchmarks.planner", "--case", name])
    fixed = sum(found.memory.get(part, 0) for part in ("teacher weights", "student weights", "optimizer state"))
    off, above = found.peak / measured["bytes"], (found.peak - fixed) / (measured["bytes"] - fixed)
    flops = found.flops / measured["flops"] - 1
    case = CASES[name]
    cells = (
        f"{name}: {case.model}, {case.teacher_layers} → {case.student}, {case.batch} × {case.seq}",
        f"{found.peak / 2**20:.0f}",
        f"{measured['bytes'] / 2**20:.0f}",
        f"{off - 1:+.1%}",
        f"{above - 1:+.1%}",
        "–" if math.isnan(flops) else f"{flops:+.2%}",
    )
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| case: teacher, layers → student, batch × length | planned MiB | measured MiB | off | without weights and optimizer | FLOPs off |
|---|---:|---:|---:|---:|---:|"""  # noqa: E501


def main(argv: list[str] | None = None) -> None:
    """Measure one case here, or print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure this case in this process")
    parser.add_argument("--only", metavar="NAME,…", help=f"only these, of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=Path("reports/bench/planner.md"), help="(%(default)s)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.case:
        print(json.dumps(measure(args.case)))
        return
    names = list(CASES) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"no case is called {', '.join(unknown)}; the cases are {', '.join(CASES)}.")
    print(HEAD, flush=True)
    lines = []
    for name in names:
        lines.append(row(name))
        print(lines[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([HEAD, *lines]) + "\n")


if __name__ == "__main__":
    main()
