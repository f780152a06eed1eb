"""Run the teacher for a cache: first one row, to see what it gives, then shard by shard."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.task import REGRESSION, SEVERAL_LABELS
from fakit.models.blocks import is_encoder_decoder, without_adapter
from fakit.models.kinds import is_causal_lm
from fakit.objective.positions import predicting_positions
from fakit.tracing.capture import capture
from fakit.tracing.inputs import MODEL_INPUTS, find_documents, taken_columns
from fakit.tracing.trace import BY_TOKEN, Trace
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import config_facts, rows_of
from fakit.training.teacher_cache.packing import pack, pack_top_k
from fakit.training.teacher_cache.size import OFFSETS, PER_ROW, bytes_of_one, layout_of

_INSTEAD = "cache hidden states and logits alone (attentions=()), and align attention with the live teacher."
# The tensor that numbers the documents of each row, where rows come with position_ids.
DOCUMENTS = "documents"
# The tensor that says at which tokens logits are kept, where they are not kept at all.
KNOWN = "logits.known"


def describe(teacher: nn.Module, dataset: Sequence[Mapping], content: CacheContent) -> dict:
    """What the manifest says of the teacher and its tensors, seen in the longest of the rows;
    refuses what a cache cannot hold.

    Raises:
        ValueError: a teacher that is training, reads no tokens or has no logits to keep, an encoder-decoder, a k above
            the number of classes, attention that queries and keys alone do not make: maps of the model's own, a
            position bias, patterns other than causal and windows; a teacher that looks at padding (FNet); a stream;
            rows that are not tokenized, have no tokens, differ in their columns,
            or have one without an entry for each token.
    """
    name = type(without_adapter(teacher)).__name__
    if teacher.training:
        raise ValueError(
            f"{name} is in train mode: with dropout its answers are different every time. teacher.eval(); load_teacher "
            "does so."
        )
    if teacher.main_input_name != "input_ids":
        raise ValueError(
            f"{name} reads {teacher.main_input_name}, and a cache holds rows of tokens (input_ids). Distil from the "
            "live teacher."
        )
    if is_encoder_decoder(teacher):
        raise ValueError(
            f"{name} is an encoder-decoder, whose rows have tokens on two sides; a cache holds one. Distil from the "
            "live teacher."
        )
    taken = taken_columns(teacher)
    if not is_causal_lm(teacher) and taken is not None and "attention_mask" not in taken:
        raise ValueError(
            f"{name} takes no attention_mask, so what it gives for a text depends on the padding that its batch "
            "happens to need, and no stored answer would be the live teacher's. Distil from the live teacher."
        )
    columns = columns_of(teacher)
    longest = dataset[_longest_row(name, dataset, columns)]
    tokens = _mask(longest).bool()
    inputs = {key: torch.as_tensor(longest[key])[tokens] for key in columns if _given(longest, key)}
    document = _longest_document(inputs)
    if content.tokens != "all" and not is_causal_lm(teacher):
        raise ValueError(
            f"tokens={content.tokens!r} keeps the logits of a causal model where the next token has a label, and "
            f"{name} is none; leave it out."
        )
    trace = _run(teacher, [document], columns, content, "right")
    if trace.maps:
        raise ValueError(
            f"{name} shows its attention only as maps (B, H, T, T), and a cache holds queries and keys; {_INSTEAD}"
        )
    classes = None
    if content.logits:
        if trace.logits is None:
            raise ValueError(f"{name} has no output head, so it gives no logits to cache: logits=False.")
        classes = trace.logits.shape[-1]
        if content.top_k is not None and content.top_k > classes:
            raise ValueError(f"top_k={content.top_k} of {name}, which has {classes} classes; keep at most {classes}.")
        if content.top_k is not None and trace.logits.dim() == 2 and trace.problem_type in (REGRESSION, SEVERAL_LABELS):
            raise ValueError(
                f"top_k={content.top_k} of {name}, whose problem_type is {trace.problem_type}: its {classes} outputs "
                "are no distribution, whose rest is known by its mass. Keep all (top_k=None)."
            )
    attention = {str(layer): _settings(name, layer, inputs) for layer, inputs in trace.attention.items()}
    config = config_facts(teacher.config)
    config.pop("quantization_config", None)
    known = torch.ones_like(trace.mask[0].cpu()) if content.tokens != "all" else None
    packed = _pack(trace, 0, trace.mask[0], content, known)
    if "position_ids" in inputs:
        packed[DOCUMENTS] = torch.zeros(0, dtype=torch.int32)
    at_some = {key: "position" for key in packed if KNOWN in packed and key.startswith("logits") and key != KNOWN}
    layout = layout_of(packed, at_some | {key: "row" for key in packed if key.startswith(PER_ROW)})
    return {
        "name": name,
        "config": config,
        "precision": str(teacher.dtype).removeprefix("torch."),
        "causal": is_causal_lm(teacher),
        "columns": columns,
        "classes": classes,
        "attention": attention,
        "longest": int(tokens.sum()),
        "layout": layout,
        # bytes of one token, or of one row
        "sizes": bytes_of_one(layout),
    }


def columns_of(teacher: nn.Module) -> list[str]:
    """The columns that the teacher's forward pass takes, without what losses are made of (labels,
    where an answer begins and ends).
    """
    taken = taken_columns(teacher)
    taken = MODEL_INPUTS if taken is None else taken | {"attention_mask"}
    return sorted(name for name in taken if "label" not in name and not name.endswith("_positions"))


def _given(row: Mapping, name: str) -> bool:
    return name != "attention_mask" and row.get(name) is not None


def _longest_row(teacher: str, dataset, columns: list[str]) -> int:
    """The number of the row with the most tokens, after a look at every row."""
    first, longest = None, (0, 0)
    for number, row in enumerate(rows_of(dataset)):
        ids = row.get("input_ids") if isinstance(row, Mapping) else None
        if ids is None:
            raise ValueError(
                f"row {number} of the data set holds "
                f"{sorted(row) if isinstance(row, Mapping) else type(row).__name__}; a cache is made of tokenized "
                "rows, with input_ids (T,): tokenize the data set first."
            )
        length = int(_mask(row).sum())
        if length == 0:
            raise ValueError(
                f"row {number} of the data set has no tokens (of {len(ids)} input_ids none counts), so the teacher has "
                "nothing to say of it; leave empty texts out."
            )
        longest = max(longest, (length, -number))
        own = [name for name in columns if _given(row, name)]
        first = own if first is None else first
        if own != first:
            raise ValueError(
                f"rows of the data set differ in what the teacher is given: row 0 holds {', '.join(first)}, row "
                f"{number} {', '.join(own)}. Give every row the same columns."
            )
        for name in own:
            if not hasattr(row[name], "__len__") or len(row[name]) != len(ids):
                raise ValueError(
                    f"{teacher} takes {name}, which in row {number} has no entry for each of its {len(ids)} tokens, "
                    "and a cache holds rows of tokens. Leave the column out of the data set, or distil from the live "
                    "teacher."
                )
    return -longest[1]


def _longest_document(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a packed row the longest document alone; any other row as it is. Tensors (T, …)"""
    documents = find_documents({name: x[None] for name, x in inputs.items()})
    if documents is None:
        return inputs
    own = documents[0] == documents[0].bincount().argmax()
    return {name: x[own] for name, x in inputs.items()}


def make_shard(
    teacher: nn.Module,
    rows: list[Mapping],
    content: CacheContent,
    columns: Sequence[str],
    batch_size: int,
    padding_side: str,
) -> dict[str, Tensor]:
    """{name: (tokens of all rows, …) or (rows, …)}, rows one after another, and their offsets (rows + 1,)."""
    lengths = [int(_mask(row).sum()) for row in rows]
    kept: list[dict[str, Tensor] | None] = [None] * len(rows)
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i]["input_ids"])
    )  # neighbors of one length need little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        trace = _run(teacher, [rows[i] for i in indices], columns, content, padding_side)
        for b, i in enumerate(indices):
            known = predicting_tokens(rows[i], i) if content.tokens != "all" else None
            kept[i] = _pack(trace, b, trace.mask[b], content, known)
            if _given(rows[i], "position_ids"):  # rows of it may be packed
                kept[i][DOCUMENTS] = _documents(trace, b)
    shard = {key: torch.cat([tensors[key] for tensors in kept]).contiguous() for key in kept[0]}
    shard[OFFSETS] = torch.tensor([0, *accumulate(lengths)])
    return shard


def _documents(trace: Trace, b: int) -> Tensor:
    """The number of each token's document, int32 (n,)"""
    documents = torch.zeros_like(trace.mask, dtype=torch.int32) if trace.documents is None else trace.documents
    return documents[b][trace.mask[b]].to("cpu", torch.int32)


def _run(
    teacher: nn.Module, rows: list[Mapping], columns: Sequence[str], content: CacheContent, padding_side: str
) -> Trace:
    def padded(values: list[Tensor]) -> Tensor:
        return pad_sequence(values, batch_first=True, padding_side=padding_side)

    names = [name for name in columns if _given(rows[0], name)]
    batch = {name: padded([torch.as_tensor(row[name]) for row in rows]) for name in names}
    batch["attention_mask"] = padded([_mask(row) for row in rows])
    with torch.no_grad():
        return capture(teacher, batch, **content.asked())


def _mask(row: Mapping) -> Tensor:
    mask = row.get("attention_mask")
    return torch.as_tensor([1] * len(row["input_ids"]) if mask is None else mask)


def predicting_tokens(row: Mapping, number: int) -> Tensor:
    """Which of a row's n tokens are followed by one that an output term looks at: a labeled one, or any where the text
    has no label. bool (n,)

    Raises:
        ValueError: labels that are not the tokens'.
    """
    tokens, labels = _mask(row).bool(), row.get("labels")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != tokens.shape:
            raise ValueError(
                f"row {number} has labels {tuple(labels.shape)} beside {len(tokens)} tokens, and logits are to be kept "
                "where the next token has a label; give each token one (-100 for none), or keep them everywhere "
                "(tokens='all')."
            )
        labels = labels[tokens][None]
    names = [name for name in ("input_ids", "position_ids", "seq_idx") if row.get(name) is not None]
    own = {name: torch.as_tensor(row[name])[tokens][None] for name in names}
    mask = torch.ones(1, int(tokens.sum()), dtype=torch.bool)
    return pad(predicting_positions(mask, labels, True, find_documents(own))[0], (0, 1))


def counts_of(dataset, labeled: bool) -> list[tuple[int, int]]:
    """How many tokens every row has, and at how many of them logits are kept."""
    columns, found = ("input_ids", "attention_mask", "labels", "position_ids", "seq_idx"), []
    for number, row in enumerate(rows_of(dataset, columns)):
        tokens = int(_mask(row).sum())
        found.append((tokens, int(predicting_tokens(row, number).sum()) if labeled else tokens))
    return found


def _pack(trace: Trace, b: int, tokens: Tensor, content: CacheContent, known: Tensor | None) -> dict[str, Tensor]:
    """Row b's tensors as they are stored; `tokens` bool (T,) says which of its places are no padding, and `known`
    bool (n,) at which of those logits are kept; None: at all.
    """
    held = [(f"{name}.{layer}", x) for name in BY_TOKEN for layer, x in getattr(trace, name).items()]
    tensors = {key: x[b][tokens] for key, x in held}  # (n, d)
    for name in content.inputs:
        for layer, x in getattr(trace, name).items():
            tensors[f"{name}.{layer}"] = x[b][:, tokens].transpose(0, 1)  # (n, H, d_head)
    packed = {}
    for key, values in tensors.items():
        try:
            packed |= _named(key, pack(values.cpu(), content.dtype))
        except ValueError as error:
            what, layer = key.split(".")
            raise ValueError(f"{trace.name}, {what.replace('_', ' ')} of layer {layer}: {error}") from error
    if content.logits:
        per_token = trace.logits.dim() == 3
        logits = trace.logits[b][tokens] if per_token else trace.logits[b : b + 1]  # (n, V) or (1, C)
        if known is not None:
            logits = logits[known.to(logits.device)]
            packed[KNOWN] = known
        how = (content.top_k, content.dtype, content.temperatures)
        stored = pack(logits, content.dtype) if content.top_k is None else pack_top_k(logits, *how)
        packed |= _named("logits" if per_token else f"{PER_ROW}logits", {k: v.cpu() for k, v in stored.items()})
    return packed


def _named(key: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key}{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}


# -- what a layer does to its scores ----------------------------------------------------------------------------------


def _settings(name: str, layer: int, inputs: AttentionInputs) -> dict:
    """What, beside queries, keys and padding, makes a layer's maps; seen in one row (1, T) without padding."""
    for bias in inputs.biases():
        allowed = inputs.allowed()
        added = bias if allowed is None else bias.masked_fill(~allowed, 0.0)
        if added.any():
            raise ValueError(
                f"layer {layer} of {name} adds a position bias to its attention scores (T5, ALiBi), which a cache of "
                f"queries and keys does not hold; {_INSTEAD}"
            )
    back, ahead = _reach(name, layer, inputs.allowed(), inputs.query.shape[2])
    return {
        "scaling": float(inputs.scaling),
        "softcap": inputs.softcap,
        "sinks": None if inputs.sinks is None else inputs.sinks.float().tolist(),  # (H,)
        "back": back,
        "ahead": ahead,
    }


def _reach(name: str, layer: int, allowed: Tensor | None, tokens: int) -> tuple[int | None, int | None]:
    """How far a query looks back and ahead, in tokens; None for as far as there are tokens."""
    if allowed is None:
        return None, None
    allowed = allowed.expand(*allowed.shape[:2], tokens, tokens).flatten(0, 1)  # (1 or H, T, T)
    distance = torch.arange(tokens, device=allowed.device)
    distance = distance[:, None] - distance  # of the query behind the key; (T, T)
    back, ahead = int(distance[allowed[0]].max()), int(-distance[allowed[0]].min())
    if not torch.equal(allowed, ((distance <= back) & (distance >= -ahead)).expand_as(allowed)):
        raise ValueError(
            f"layer {layer} of {name} attends in a pattern that is neither full, causal nor a sliding window (chunks, "
            f"blocks, or one pattern a head), which a cache does not hold; {_INSTEAD}"
        )
    return (None if back == tokens - 1 else back), (None if ahead == tokens - 1 else ahead)
