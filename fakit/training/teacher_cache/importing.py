"""A cache of a teacher that others ran: from files of its largest log-probabilities (`published`), without a model."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from fakit.files import check_room, locked, sha256
from fakit.training.teacher_cache.build import KNOWN, counts_of, predicting_tokens
from fakit.training.teacher_cache.cache import TeacherCache
from fakit.training.teacher_cache.compressed import Compression
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import combined, config_facts, row_hashes, tokenizer_fingerprint
from fakit.training.teacher_cache.manifest import PUBLISHED, VERSION, append_shard, hashed_columns, own_folder
from fakit.training.teacher_cache.packing import pack_known
from fakit.training.teacher_cache.published import Answer, read_answers
from fakit.training.teacher_cache.size import OFFSETS, bytes_of_one, layout_of, planned_bytes, planned_cache

logger = logging.getLogger(__name__)

_COLUMNS = ["attention_mask", "input_ids"]
_SHARD_BYTES = 2**28


def completion_request(row: Mapping, model: str, top_k: int) -> dict:
    """What to send to a vLLM server's /v1/completions for a row, so that its answer can be read here.

    The server must allow so many (`vllm serve … --max-logprobs K`). Its one generated token is not used.

    >>> completion_request({"input_ids": [5, 7]}, "teacher", 20)["prompt"]
    [5, 7]
    """
    asked = {"prompt_logprobs": top_k, "return_token_ids": True, "add_special_tokens": False}
    return {"model": model, "prompt": _ids(row), "max_tokens": 1, "temperature": 1.0} | asked


def published_rows(
    files: Sequence[str | Path], compression: Mapping[str, Any] | None = None
) -> list[dict[str, list[int]]]:
    """The texts of files that say their tokens, each token labeled: the data set of a published set of logits.

    Args:
        compression: DistillKit's settings, as of `import_published`.

    Raises:
        ValueError: an answer without its token ids.
    """
    rows = []
    for answer in read_answers(files, compression=compression and Compression.of(compression)):
        if answer.input_ids is None:
            raise ValueError(f"{answer.where} does not say its token ids (prompt_token_ids, input_ids); give the rows.")
        ids = [int(token) for token in answer.input_ids]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return rows


def import_published(
    folder: str | Path,
    files: Sequence[str | Path],
    dataset,
    config: PreTrainedConfig,
    tokenizer=None,
    top_k: int | None = None,
    dtype: str = "float16",
    shard_rows: int | None = None,
    compression: Mapping[str, Any] | None = None,
) -> TeacherCache:
    """Make a cache of answers in files, the i-th of them that of row i. It serves output terms at temperature 1 with a
    loss of `fakit.losses.top_k.SERVED`; of the teacher's weights nothing is known, so that no teacher is refused.

    Args:
        folder: of the cache; it holds none yet.
        files: see `published`, in order.
        dataset: tokenized rows, as `TeacherCache.build` takes them, without position_ids. Logits are kept where the
            next token has a label, and everywhere where a row has no labels.
        config: the teacher's, of a causal language model: AutoConfig.from_pretrained(id, trust_remote_code=False).
        tokenizer: the rows'; its fingerprint is recorded, and messages show its tokens.
        top_k: keep so many; None: as many as every distribution has.
        compression: of files with DistillKit's compressed columns the settings that they were packed with, by its own
            names (`fakit.training.teacher_cache.compressed`): {"d": 128256, "k": 128, "exact_k": 16, …}.
        dtype, shard_rows: as `TeacherCache.build`; float16 is finer than bfloat16 for log-probabilities.

    Raises:
        ValueError: before anything is written: files that cannot be read, an answer that is not of its row (row and
            position), another number of answers than rows, a token beyond the vocabulary, no room on the disk.
    """
    folder, files = own_folder(folder), [Path(file) for file in files]
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds a cache already; import into another folder, or delete this one.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{type(config).__name__} is of no causal language model, and answers are at every next token."
        )
    classes = config.get_text_config().vocab_size
    packing = None if compression is None else Compression.of(compression)
    k, longest = _checked(files, dataset, tokenizer, top_k, classes, packing)
    content = CacheContent(top_k=k, dtype=dtype, tokens="labeled")
    hashes = row_hashes(dataset, hashed_columns({"columns": _COLUMNS}, content))
    layout = _layout(k, classes, dtype)
    digest = hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
    precision = getattr(config, "dtype", None) or torch.float32
    manifest = {
        "version": VERSION,
        "teacher": PUBLISHED + digest,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "data": combined(hashes),
        "content": content.written(),
        "rows": len(dataset),
        "padding_side": "right",
        "name": (config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__])[0],
        "config": config_facts(config),
        "precision": str(precision).removeprefix("torch."),
        "causal": True,
        "columns": _COLUMNS,
        "classes": classes,
        "attention": {},
        "longest": longest,
        "layout": layout,
        "sizes": bytes_of_one(layout),
        "files": [file.name for file in files],
        "shards": [],
    }
    shard_rows = shard_rows or max(1, _SHARD_BYTES // (sum(manifest["sizes"].values()) * longest))
    counts = counts_of(dataset, labeled=True)
    sizes = planned_bytes(layout, counts, shard_rows)
    check_room(folder, sum(sizes) + 2**14 * len(sizes), "the teacher cache")
    logger.warning("%s", planned_cache(folder, counts, sizes, labeled=True))
    with locked(folder / "build.lock"):
        made: list[dict[str, Tensor]] = []
        for number, tensors in enumerate(_rows(files, dataset, k, classes, dtype, packing), 1):
            made.append(tensors)
            if len(made) == shard_rows or number == len(dataset):
                shard = {key: torch.cat([one[key] for one in made]) for key in made[0]}
                shard[OFFSETS] = torch.tensor([0, *accumulate(len(one[KNOWN]) for one in made)])
                append_shard(folder, manifest, shard, hashes[number - len(made) : number])
                made = []
    return TeacherCache.open(folder)


def _checked(files, dataset, tokenizer, top_k: int | None, classes: int, packing) -> tuple[int, int]:
    """k, and the tokens of the longest row, after a look at every answer beside its row."""
    number, widths, longest = 0, set(), 0
    for number, answer in enumerate(read_answers(files, top_k, packing), 1):
        if number > len(dataset):
            continue
        row = dataset[number - 1]
        if row.get("position_ids") is not None:
            raise ValueError(f"row {number - 1} has position_ids, and of packed texts no server knows; give one a row.")
        ids = _ids(row)
        answer.check(number - 1, ids, tokenizer)
        if answer.tokens < 2:
            raise ValueError(f"{answer.where} is of {answer.tokens} token; a text of two at least has a next token.")
        if (beyond := int(answer.indices.max())) >= classes or int(answer.indices.min()) < 0:
            raise ValueError(
                f"{answer.where} holds the token {beyond}, and the teacher's configuration has {classes} (vocab_size): "
                "it is another's."
            )
        widths.add(answer.indices.shape[1])
        longest = max(longest, len(ids))
    if number != len(dataset) or not number:
        raise ValueError(
            f"{number} answers in {', '.join(file.name for file in files)}, and {len(dataset)} rows; give the answer "
            "of every row, in their order."
        )
    return min(widths), longest


def _ids(row: Mapping) -> list[int]:
    ids, mask = torch.as_tensor(row["input_ids"]), row.get("attention_mask")
    return (ids if mask is None else ids[torch.as_tensor(mask).bool()]).tolist()


def _rows(files, dataset, k: int, classes: int, dtype: str, packing) -> Iterator[dict[str, Tensor]]:
    for number, answer in enumerate(read_answers(files, k, packing)):
        yield _packed(answer, predicting_tokens(dataset[number], number), classes, dtype)


def _packed(answer: Answer, known: Tensor, classes: int, dtype: str) -> dict[str, Tensor]:
    at = known[:-1]  # nothing comes behind the last token
    stored = pack_known(answer.values[at], answer.indices[at], classes, dtype)
    return {KNOWN: known} | {f"logits{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}


def _layout(k: int, classes: int, dtype: str):
    none = Answer("", 2, None, torch.zeros(1, k, dtype=torch.long), torch.zeros(1, k, dtype=torch.float64))
    packed = _packed(none, torch.tensor([True, False]), classes, dtype)
    return layout_of(packed, {key: "position" for key in packed if key != KNOWN})
