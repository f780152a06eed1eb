"""What a tokenizer adds to a text by itself."""


def added_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind every text: ([BOS], []) for Llama and Gemma, ([], [EOS])
    for T5, nothing for GPT-2.

    Asked of the tokenizer as it is now, so `add_bos_token` and a post-processor that was set later count.

    Raises:
        ValueError: a tokenizer whose special tokens stand inside the text.
    """
    for text in ("a", "0", "A", "the"):  # a small vocabulary may make nothing of the first
        bare, whole = (list(tokenizer(text, add_special_tokens=add).input_ids) for add in (False, True))
        if bare:
            break
    if not bare:
        raise ValueError(f"{type(tokenizer).__name__} makes no token of any of 'a', '0', 'A', 'the'; it reads no text.")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ValueError(
        f"{type(tokenizer).__name__} writes {text!r} as {bare}, and with its special tokens as {whole}, which does not "
        "contain it; what it puts before and behind a text is unknown."
    )


def without_begin(ids: list[int], begin: list[int]) -> list[int]:
    """A text that spells its BOS out gets no second one."""
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids


def with_end(ids: list[int], end: list[int]) -> list[int]:
    """A text that spells its end out gets no second one."""
    return ids if ids[-len(end) :] == end else ids + end
