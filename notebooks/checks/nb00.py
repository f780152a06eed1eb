"""Exercises of notebook 00."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from fakit.teaching import Exercise

# -- 00.1: hidden states from two hooks -------------------------------------------------------------------------------


class _Watched(BertForSequenceClassification):
    """Counts its forward passes, and notes when one was asked for the tuple of hidden states."""

    passes, gave_tuple = 0, False

    def forward(self, *args, **kwargs):
        self.passes += 1
        self.gave_tuple |= bool(kwargs.get("output_hidden_states"))
        return super().forward(*args, **kwargs)


def _bert(seed: int, kind: type[nn.Module] = BertForSequenceClassification, layers: int = 4):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    return kind(config).eval()


def _hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def _check_hooks(function) -> str | None:
    with torch.random.fork_rng(devices=[]):
        model = _bert(0, _Watched)
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        true = model(**batch, output_hidden_states=True).hidden_states
    for layers in ((1, 3), (0, 4)):
        model.passes, model.gave_tuple, before = 0, False, _hooks_of(model)
        with torch.no_grad():
            kept = function(model, batch, layers)
        if message := _wrong_states(kept, layers, true):
            return message
        if model.gave_tuple:
            return "right, but out of transformers' own tuple (`output_hidden_states`): here hooks are to fetch them."
        if model.passes != 1:
            return f"the model ran {model.passes} times for {len(layers)} layers; one forward pass passes both hooks."
        if left := _hooks_of(model) - before:
            return (
                f"right, but {left} of the hooks are still there and will keep the states of every later forward pass, "
                "which costs memory: call `remove()` on each handle."
            )
    return None


def _wrong_states(kept, layers: tuple[int, int], true: tuple[Tensor, ...]) -> str | None:
    """What is wrong with the states that were kept, in words; None where nothing is."""
    if not isinstance(kept, dict):
        return f"it returns a {type(kept).__name__}; a dictionary {{layer number: hidden state}} was asked for."
    if list(kept) == [layers[-1]]:
        return (
            f"of layers {layers} only {layers[-1]} is kept. A function that is made in a loop looks its variables up "
            "when it is *called*, and then the loop is at its end: bind the number, `def keep(module, inputs, output, "
            "layer=layer)`, or make the function inside another one."
        )
    if set(kept) != set(layers):
        return f"asked for the layers {list(layers)}, its keys are {list(kept)}: keys are layer numbers."
    for layer in layers:
        state = kept[layer]
        if isinstance(state, tuple):
            return (
                f"under {layer} it keeps a tuple in place of a tensor. A hook gets its module's `inputs` as a tuple, "
                "and some families' blocks *return* one; the hidden state is the first entry of what a block returns."
            )
        if not isinstance(state, Tensor):
            return f"under {layer} it keeps a {type(state).__name__}; a hidden state is a tensor (B, T, d)."
        equal = [i for i, truth in enumerate(true) if state.shape == truth.shape and torch.allclose(state, truth)]
        if layer in equal:
            continue
        if layer == 0 and len(true) - 1 in equal:
            return "under 0 it keeps the last block's output: `layer[-1]` is the last block. 0 is the embeddings."
        if layer + 1 in equal:
            return (
                f"off by one: under {layer} it keeps the output of block {layer + 1}. A Python list counts from 0, and "
                "layer 0 is the embeddings, so block i is the list's entry i − 1."
            )
        if layer - 1 in equal:
            return (
                f"off by one: under {layer} it keeps the state of layer {layer - 1}, which is what block {layer} is "
                "*given*. Keep the third argument of the hook, the output."
            )
        return f"what it keeps under {layer}, of shape {tuple(state.shape)}, is the output of no layer."
    return None


hooks = Exercise(
    "Write `my_capture`: it gets a BERT, a batch and two layer numbers, and returns `{number: hidden state}`. Register "
    "a forward hook on each of the two modules, run the model once, and take the hooks away again. Layer 0 comes from "
    "`model.bert.embeddings`, the blocks stand in the list `model.bert.encoder.layer`. The check compares with what "
    "transformers itself returns under `output_hidden_states=True`, for several layers.",
    _check_hooks,
    hints=[
        "A hook is a function of `(module, inputs, output)`, called after its module's forward pass. It may write the "
        "output into a dictionary that lives outside of it.",
        "`handle = module.register_forward_hook(keep)` for both, then `model(**batch)`, then `handle.remove()` for "
        "both. Each hook has to know its own number.",
        """```python
def my_capture(model, batch, layers):
    kept = {}

    def keeper(layer):
        def keep(module, inputs, output):
            kept[layer] = output

        return keep

    modules = [model.bert.embeddings, *model.bert.encoder.layer]  # by layer number
    handles = [modules[layer].register_forward_hook(keeper(layer)) for layer in layers]
    model(**batch)
    for handle in handles:
        handle.remove()
    return kept
```
A forward pass that fails would leave these hooks behind: `try … finally` takes them away then, too.""",
    ],
    done="these are the model's own hidden states, and it is as it was.",
    number="00.1",
    difficulty=3,
    minutes=15,
)


# -- 00.2: the temperature at which half is left ----------------------------------------------------------------------

_LOGITS = (torch.tensor([4.0, 1.0, 0.5, -1.0, -2.0]).double(), torch.tensor([-1.0, 12.0, 3.0, 7.5]).double())


def _check_temperature(function) -> str | None:
    for logits in _LOGITS:
        tau = float(function(logits.clone()))
        found = (logits / tau).softmax(-1).max().item()
        if abs(found - 0.5) < 0.02:
            continue
        if abs((logits * tau).softmax(-1).max().item() - 0.5) < 0.02:
            return "you multiply the logits by τ; they are divided by it."
        heat = "more" if found > 0.5 else "less"
        return f"for {logits.tolist()} it gives τ = {tau:g}, and the largest probability is {found:.3f}: {heat} heat."
    return None


temperature = Exercise(
    "Write `my_temperature`: for the logits of one text it returns a temperature at which the largest probability is "
    "0.50 (± 0.02). What would you set the slider to, for the first text?",
    _check_temperature,
    hints=[
        "Move the slider: what happens to the largest probability as τ rises?",
        "It falls as τ rises. Halve an interval again and again, or try many temperatures at once.",
        "```python\ndef my_temperature(logits):\n"
        "    taus = torch.linspace(0.05, 50, 20_000)\n"
        "    highest = (logits / taus[:, None]).softmax(-1).max(-1).values\n"
        "    return taus[(highest - 0.5).abs().argmin()].item()\n```",
    ],
    done="well done. `my_temperature(teacher_logits[0])` is the slider's place for the first text.",
    number="00.2",
    difficulty=2,
    minutes=5,
)


# -- 00.3: the output term --------------------------------------------------------------------------------------------

_TEACHER, _STUDENT = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double().unbind()


def _check_output_term(function) -> str | None:
    p, q = (_TEACHER / 3).softmax(-1), (_STUDENT / 3).softmax(-1)
    forward = (p * (p.log() - q.log())).sum(-1).mean().item()
    backward = (q * (q.log() - p.log())).sum(-1).mean().item()
    crossed = -(p * q.log()).sum(-1).mean().item()
    found = float(function(_STUDENT.clone(), _TEACHER.clone(), 3.0))
    answers = {
        9 * forward: None,
        forward: "right but for the factor τ²: without it a hotter temperature quietly weakens the term.",
        9 * backward: "that is KL(student ‖ teacher): the reverse divergence. Swap the two.",
        9 * forward / p.shape[-1]: "you divide by the number of labels too (`reduction='mean'` does): sum over labels, "
        "mean over texts.",
        9 * forward * len(p): "you sum over the texts of the batch; the kit's losses are means over them.",
        9 * crossed: "that is the cross-entropy: it is not 0 where student and teacher agree. Subtract the teacher's "
        "entropy.",
    }
    for value, message in answers.items():
        if abs(found - value) < 1e-6 * max(1, abs(value)):
            return message
    return f"for the check's batch it gives {found:.4f}; the output term at τ = 3 is {9 * forward:.4f}."


output_term = Exercise(
    "Write the output term: $\\tau^2\\, \\mathrm{KL}(p_T \\parallel p_S)$ with $p = \\mathrm{softmax}(z / \\tau)$, a "
    "mean over the texts.",
    _check_output_term,
    hints=[
        "A divergence is a sum over labels; the loss is a mean over texts. τ appears three times.",
        "`log_softmax` of both; `p · (log p − log q)`; `.sum(-1).mean()`; times τ².",
        "```python\ndef my_output_term(student_logits, teacher_logits, tau):\n"
        "    log_p = (teacher_logits / tau).log_softmax(-1)\n"
        "    log_q = (student_logits / tau).log_softmax(-1)\n"
        "    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()\n```",
    ],
    done="well done. `fakit.losses.outputs.forward_kl` is the same, with a mask for tokens that do not count.",
    number="00.3",
    difficulty=2,
    minutes=10,
)


# -- 00.4: half of the total ------------------------------------------------------------------------------------------

_TERMS = (
    {"features": 0.2, "attention": 0.5, "outputs": 1.4, "task": 0.9},
    {"features": 0.1, "attention": 0.3, "outputs": 0.4, "task": 2.0},
)


def _check_weight(function) -> str | None:
    for raw in _TERMS:
        weight, outputs = float(function(dict(raw))), raw["outputs"]
        rest = sum(raw.values()) - outputs
        share = weight * outputs / (weight * outputs + rest)
        if abs(share - 0.5) < 0.01:
            continue
        if abs(weight - outputs / rest) < 0.01 * weight:
            return "that is the inverse: divide the others by the output term."
        if abs(weight - 0.5) < 0.01:
            return "half the weight is not half the total: the terms are not of one size."
        if abs(weight - (rest + outputs) / outputs) < 0.01 * weight:
            return "you divide the whole total by the output term: only the *other* terms have to be matched."
        return f"for {raw} it gives {weight:g}, with which the output term is {100 * share:.0f} % of the total."
    return None


weight = Exercise(
    "`after.terms` of section 6 holds the four losses before weighting. Write `my_weight`: given such a dictionary, it "
    "returns the weight of `outputs` at which, the others staying at 1, the output term is **half** of the total.",
    _check_weight,
    hints=[
        "Half of the total means: as much as the others together.",
        "weight × outputs = features + attention + task.",
        "```python\ndef my_weight(terms):\n    return (sum(terms.values()) - terms['outputs']) / terms['outputs']\n```",
    ],
    done="well done. Try `my_weight(after.terms)` on the sliders of section 8.",
    number="00.4",
    difficulty=1,
    minutes=5,
)


# -- 00.5: a bug to find ----------------------------------------------------------------------------------------------


def _check_bug(step) -> str | None:
    with torch.random.fork_rng(devices=[]):
        teacher, student = _bert(0, layers=1).requires_grad_(False), _bert(1, layers=1)
        teacher.classifier.weight.data.mul_(50)  # with opinions that dropout can change
        pair = nn.ModuleDict({"teacher": teacher, "student": student})
        batch = {"input_ids": torch.arange(12).view(3, 4)}
        first, second = (step(pair, batch) for _ in range(2))
    student_trains, teacher_trains = student.training, teacher.training
    with torch.no_grad():
        at_rest = teacher.eval()(**batch).logits
    if not first[0].requires_grad:
        return "the student's logits carry no gradient now: only the teacher belongs under `no_grad`."
    if first[1].requires_grad:
        return "the teacher's logits carry a gradient now: keep it under `no_grad`."
    if not torch.allclose(first[1], second[1], atol=1e-5):
        return (
            "asked twice, the teacher still gives two answers: what does `train()` switch on in *every* module below?"
        )
    if not torch.allclose(first[1], at_rest, atol=1e-4):
        return (
            "the same twice, but not what the teacher says at rest: a fixed seed repeats the dropout, it does not "
            "remove it."
        )
    if not student_trains:
        return "now the student stands still too: it needs its dropout, only the teacher does not."
    if teacher_trains:
        return "the targets are right, but the teacher is left in train mode for whoever asks it next."
    return None


bug = Exercise(
    "Find the bug in `colleagues_step` and write it without.",
    _check_bug,
    hints=[
        "`no_grad` switches gradients off. It does not switch dropout off.",
        "`pair.train()` reaches every module below it. Which one must not be reached?",
        "```python\ndef my_step(pair, batch):\n    pair.train()\n    pair['teacher'].eval()\n"
        "    with torch.no_grad():\n        theirs = pair['teacher'](**batch).logits\n"
        "    ours = pair['student'](**batch).logits\n    return ours, theirs\n```",
    ],
    done="well done. `DistillationTrainer` keeps the teacher in eval mode for you.",
    number="00.5",
    difficulty=2,
    minutes=10,
)
