"""The `scans` task: undo the errors of a poor text scanner, character by character.

Only clean lines are shipped. The noisy ones are computed here from the line and a seed, so every machine gets the same
pairs and a teacher can be trained on fresh noise each epoch.
"""

import random
import re
import string

SEPARATOR = "\n"  # between the noisy and the clean line; an ordinary character, so any causal tokenizer can encode it
ALPHABET = SEPARATOR + " " + string.ascii_letters + string.digits + string.punctuation

# What a scanner mistakes for what.
CONFUSIONS = {
    "rn": ("m",), "vv": ("w",), "h": ("b",), "b": ("h",), "w": ("vv",), "m": ("n", "rn"), "n": ("m",),
    "c": ("e",), "H": ("B",), "B": ("H",), "W": ("VV",), "M": ("N",), "N": ("M",),
}  # fmt: skip
GLYPHS = re.compile("rn|vv|.", re.DOTALL)  # "rn" and "vv" before "r", "n" and "v"
CONFUSE, DROP, DOUBLE, DROP_BLANK, ADD_BLANK = 0.33, 0.02, 0.02, 0.06, 0.012  # probability at each place it can happen


def add_scan_noise(line: str, seed: int = 0) -> str:
    """Return `line` as a poor scanner would read it: confused letters, dropped and doubled characters and blanks.

    The noise depends on the line and the seed alone (not on the order of calls or on global random state). The
    character error rate of the result is about 0.12–0.13 on English prose.

    Example:
        >>> add_scan_noise("the heavens and the earth", seed=1) == add_scan_noise("the heavens and the earth", seed=1)
        True
    """
    chance = random.Random(
        f"{seed}:{line}"
    )  # a string seed is hashed with sha512: the same on every platform and Python 3
    draw, noisy = chance.random, []
    for seen in GLYPHS.findall(line):
        if seen in CONFUSIONS and draw() < CONFUSE:
            read = chance.choice(CONFUSIONS[seen])
        elif draw() < (DROP_BLANK if seen == " " else DROP):
            read = ""
        elif draw() < DOUBLE:
            read = seen + seen[-1]
        else:
            read = seen
        noisy.append(read + " " if draw() < ADD_BLANK else read)
    return "".join(noisy)


def scan_tokenizer():
    """A character-level `PreTrainedTokenizerFast` over `ALPHABET` with `<pad>`, `<eos>` and `<unk>`;
    adds no special tokens itself.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
