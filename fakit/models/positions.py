"""How long a row may be: what a model's own tables of positions allow."""

import math
import re

from torch import Tensor, nn
from transformers import PreTrainedModel

# Names of tables with a row for each position, apart from those by distance or by place on a page.
_TABLES = re.compile(r"wpe|positions?_embed(dings?)?|embed_positions")


def longest_row(model: PreTrainedModel) -> int | None:
    """The longest row that a model's tables of positions allow; None where it has none (rotary or relative positions).

    A table that is read with an offset has more rows than positions: BART and OPT name an `offset`; RoBERTa, MPNet, ESM
    and their like count from padding_idx + 1, as fairseq did, and theirs are the tables that have a padding_idx.
    """
    limits, aside = [], _not_of_text(model)
    for name, module in model.named_modules():
        if (
            module not in aside
            and _TABLES.fullmatch(name.rpartition(".")[2])
            and isinstance(getattr(module, "weight", None), Tensor)
        ):
            padding = getattr(module, "padding_idx", None)
            limits.append(len(module.weight) - getattr(module, "offset", 0 if padding is None else padding + 1))
    return min([*limits, declared_positions(model) or math.inf]) if limits else None


def declared_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model was made for, as its configuration says, of rotary positions too; None where it does
    not say.
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _not_of_text(model: PreTrainedModel) -> set[nn.Module]:
    """Parts that see or hear: their tables are of patches and frames. They have configurations of their own kind."""
    kinds = {type(model.config), type(model.config.get_text_config())}
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and type(part.config) not in kinds]
    return {module for part in parts for module in part.modules()}
