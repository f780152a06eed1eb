"""Which words did it? Layer integrated gradients on the embeddings of two classifiers, compared, and put to the test.

    teacher_scores = attribute(teacher, tokenizer, texts)
    student_scores = attribute(student, tokenizer, texts, targets=teacher_scores.targets)  # the same question to both
    compare(teacher_scores, student_scores)         # same answer for the same reason?
    deletion(student, tokenizer, student_scores)    # and is the reason the model's own?

Source: Sundararajan, Taly, Yan 2017 (integrated gradients), by captum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fakit import require
from fakit.evaluation.batches import device_of, eval_mode, inputs_of, to_device


@dataclass(frozen=True)
class Attributions:
    """Token attributions of N texts, lists of arrays (T_i,) of each text's own length.

    Attributes:
        input_ids: token ids. tokens: their spelling.
        special: True where the token comes from the tokenizer, not from the text; its score is 0.
        scores: summed over the embedding's width; positive speaks for the target.
        targets: (N,) class whose logit is explained.
        outputs, baselines: (N,) that logit for the text, and with every token of the text replaced by `baseline_token`.
        delta: (N,) Σ scores − (outputs − baselines): 0 when the integral is exact (completeness).
        baseline_token: what stands for "no word".
    """

    input_ids: list[np.ndarray]
    tokens: list[list[str]]
    special: list[np.ndarray]
    scores: list[np.ndarray]
    targets: np.ndarray
    outputs: np.ndarray
    baselines: np.ndarray
    delta: np.ndarray
    baseline_token: str

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def gap(self) -> np.ndarray:
        """(N,) What completeness lacks: |delta| as a share of the change of the logit, |outputs − baselines|."""
        return np.abs(self.delta) / np.abs(self.outputs - self.baselines)


def attribute(
    model,
    tokenizer,
    texts: Sequence[str],
    targets: Sequence[int] | None = None,
    steps: int = 32,
    batch_size: int = 16,
    max_length: int = 128,
    baseline_token: str | None = None,
) -> Attributions:
    """Attribute a sequence classifier's logit to the tokens of each text.

    The path starts where every token of the text is `baseline_token` (special tokens stay) and ends at the text.

    Args:
        model: a transformers sequence classifier (or regressor, one output). Its weights need no gradient.
        tokenizer: its tokenizer.
        texts: N texts.
        targets: (N,) classes to explain; None takes the model's own predictions. Give both models the same.
        steps: points of the Gauss–Legendre rule; `delta` tells whether they suffice.
        batch_size: texts at a time. max_length: tokens kept of a text.
        baseline_token: None takes the pad token. A decoder that finds the last token by its pad id needs another one.

    Raises:
        ValueError: no texts, a text without tokens, targets of another number or beyond the classes, no baseline token,
            a 4-bit model on a CPU (8-bit works).
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("attribute: give a list with at least one text")
    if batch_size < 1:
        raise ValueError(f"attribute: batch_size={batch_size} was asked; use at least 1")
    if targets is not None and len(targets) != len(texts):
        raise ValueError(f"attribute: {len(targets)} targets for {len(texts)} texts; give one each, or None")
    if any(getattr(weight, "quant_state", None) is not None and weight.is_cpu for weight in model.parameters()):
        # Once bitsandbytes has packed them for the CPU's 4-bit kernel, no gradient passes.
        raise ValueError(
            "attribute: the model has 4-bit weights on a CPU, which let no gradient through to the embeddings; "
            "load it with quantize='8bit' or None, or on a GPU"
        )
    baseline_token = tokenizer.pad_token if baseline_token is None else baseline_token
    baseline_id = _token_id(tokenizer, baseline_token)
    parts = []
    with eval_mode(model):
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            batch = _encode(tokenizer, list(texts[part]), max_length, device_of(model))
            chosen = None if targets is None else torch.as_tensor(np.asarray(targets[part])).long()
            parts.append(_attribute_batch(model, tokenizer, batch, chosen, baseline_id, steps))
    joined = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    arrays = {name: np.array(joined.pop(name)) for name in ("targets", "outputs", "baselines", "delta")}
    return Attributions(**joined, **arrays, baseline_token=baseline_token)


def _attribute_batch(model, tokenizer, batch, targets, baseline_id: int, steps: int) -> dict[str, list]:
    require("eval", "captum")
    from captum.attr import LayerIntegratedGradients

    special = batch.pop("special_tokens_mask").bool()  # (B, T), True on padding too
    ids, mask = batch.pop("input_ids"), batch["attention_mask"]
    if empty := (special.all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"attribute: texts {empty[:5]} of this batch hold no token of their own; drop empty texts")
    baseline = torch.where(special, ids, baseline_id)
    names = list(batch)

    def forward(input_ids: Tensor, *others: Tensor) -> Tensor:
        given = {"input_ids": input_ids, **dict(zip(names, others, strict=True))}
        return model(**inputs_of(model, given)).logits.float()  # (B, C)

    others = tuple(batch.values())
    with torch.no_grad():
        logits, baseline_logits = forward(ids, *others), forward(baseline, *others)
    classes = logits.shape[1]
    targets = logits.argmax(dim=-1) if targets is None else targets.to(logits.device)
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(
            f"attribute: targets {sorted(set(targets.tolist()))} were asked of a model with {classes} classes"
        )
    method = LayerIntegratedGradients(forward, model.get_input_embeddings())
    with torch.enable_grad():
        attributions, delta = method.attribute(
            ids,
            baselines=baseline,
            target=targets,
            additional_forward_args=others,
            n_steps=steps,
            internal_batch_size=max(len(ids), 64),
            return_convergence_delta=True,
        )  # (B, T, d), (B,)
    scores = attributions.detach().sum(dim=-1).double()
    picked = [values.gather(1, targets[:, None])[:, 0].double().tolist() for values in (logits, baseline_logits)]
    rows = [row.bool() for row in mask]
    return {
        "input_ids": [ids[i][row].cpu().numpy() for i, row in enumerate(rows)],
        "tokens": [tokenizer.convert_ids_to_tokens(ids[i][row].tolist()) for i, row in enumerate(rows)],
        "special": [special[i][row].cpu().numpy() for i, row in enumerate(rows)],
        "scores": [scores[i][row].cpu().numpy() for i, row in enumerate(rows)],
        "targets": targets.tolist(),
        "outputs": picked[0],
        "baselines": picked[1],
        "delta": delta.double().tolist(),
    }


def compare(first: Attributions, second: Attributions) -> dict[str, np.ndarray]:
    """Similarity of two models' attributions, text by text, over the tokens of the text (special ones left out).

    Returns:
        "cosine" and "spearman", (N,) each in −1…1; NaN where a side is constant (a text of one token, for Spearman).

    Raises:
        ValueError: the two do not explain the same tokens and targets.
    """
    from fakit.evaluation.metrics import spearman

    if len(first) != len(second):
        raise ValueError(
            f"compare: attributions of {len(first)} texts against {len(second)}; attribute the same texts twice"
        )
    for index in range(len(first)):
        if not np.array_equal(first.input_ids[index], second.input_ids[index]):
            raise ValueError(
                f"compare: text {index} has tokens {first.tokens[index][:6]}… on one side, {second.tokens[index][:6]}… "
                "on the other; attribute the same texts with the same tokenizer and max_length"
            )
    if not np.array_equal(first.targets, second.targets):
        index = int(np.flatnonzero(first.targets != second.targets)[0])
        raise ValueError(
            f"compare: text {index} is explained for class {first.targets[index]} on one side, "
            f"{second.targets[index]} on the other; pass targets=first.targets when attributing the second model"
        )
    cosines, ranks = [], []
    for x, y, special in zip(first.scores, second.scores, first.special, strict=True):
        x, y = x[~special], y[~special]
        norm = np.linalg.norm(x) * np.linalg.norm(y)
        cosines.append(float(x @ y / norm) if norm > 0 else np.nan)
        ranks.append(spearman(x, y) if len(x) > 1 else np.nan)
    return {"cosine": np.array(cosines), "spearman": np.array(ranks)}


def deletion(
    model,
    tokenizer,
    attributions: Attributions,
    steps: int = 10,
    random_orders: int = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Faithfulness: delete tokens, the highest attribution first, and see how fast the target's probability falls.

    "Deleted" is replaced by the attributions' baseline token. Random orders are the yardstick: a model that falls fast
    whatever one deletes is fragile, not well explained, so values without it cannot be compared across models.
    The random orders depend on seed and text alone: teacher and student face the same ones.

    Returns:
        "fraction" (steps + 1,) share of tokens deleted, 0…1;
        "ordered" (N, steps + 1), "random" (N, random_orders, steps + 1): P(target), or a regressor's output, on the
        way; "gain" (N,): mean over the way of random − ordered; above 0: faithful beyond chance.
    """
    if steps < 1 or random_orders < 1:
        raise ValueError(f"deletion: steps={steps}, random_orders={random_orders} were asked; use at least 1 each")
    baseline_id = _token_id(tokenizer, attributions.baseline_token)
    fraction = np.linspace(0.0, 1.0, steps + 1)
    ordered, random = [], []
    with torch.no_grad(), eval_mode(model):
        for index in range(len(attributions)):
            ids, own = attributions.input_ids[index], np.flatnonzero(~attributions.special[index])
            rng = np.random.default_rng((seed, index))
            by_score = own[np.argsort(-attributions.scores[index][own], kind="stable")]
            orders = [by_score, *(rng.permutation(own) for _ in range(random_orders))]
            variants = np.tile(ids, (len(orders), steps + 1, 1))  # (1 + random, steps + 1, T)
            for row, order in enumerate(orders):
                for column, share in enumerate(fraction):
                    variants[row, column, order[: round(share * len(own))]] = baseline_id
            curve = _target_curve(model, variants.reshape(-1, len(ids)), attributions.targets[index], batch_size)
            curve = curve.reshape(len(orders), steps + 1)
            ordered.append(curve[0])
            random.append(curve[1:])
    ordered, random = np.stack(ordered), np.stack(random)
    return {"fraction": fraction, "ordered": ordered, "random": random, "gain": (random.mean(1) - ordered).mean(1)}


def _target_curve(model, ids: np.ndarray, target: int, batch_size: int) -> np.ndarray:
    """P(target) of each row of (R, T) token ids of one text: no padding."""
    device = device_of(model)
    values = []
    for chunk in torch.as_tensor(ids).to(device).split(batch_size):
        # A row is one text; token types, where the model has them, are 0 throughout by the model's own default.
        logits = model(
            **inputs_of(model, {"input_ids": chunk, "attention_mask": torch.ones_like(chunk)})
        ).logits.double()
        values.append(logits[:, 0] if logits.shape[1] == 1 else logits.softmax(dim=-1)[:, target])
    return torch.cat(values).cpu().numpy()


def _encode(tokenizer, texts: list[str], max_length: int, device) -> dict[str, Tensor]:
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    options["padding_side"] = "right"  # scores are found where the embeddings are asked
    return to_device(tokenizer(texts, return_special_tokens_mask=True, **options), device)


def _token_id(tokenizer, token: str | None) -> int:
    found = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ValueError(
            f"attribution: {token!r} is no token of {type(tokenizer).__name__} (its pad token is "
            f"{tokenizer.pad_token!r}); pass baseline_token= a token of the vocabulary, e.g. tokenizer.mask_token"
        )
    return found
