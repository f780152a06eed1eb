"""Find a transformer's blocks by one rule, instead of a table of model names."""

from torch import nn


def depth(model: nn.Module) -> int:
    """Number of blocks the configuration names. `num_hidden_layers` answers for n_layer and n_layers too."""
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"{type(model).__name__}'s configuration ({type(config).__name__}) names no num_hidden_layers."
        )
    return layers


def find_block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's blocks: see `find_blocks`."""
    layers = depth(model)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, m) for name, m in lists if len(m) == layers and len({type(block) for block in m}) == 1]
    outermost = [(n, m) for n, m in fitting if not any(n.startswith(f"{other}.") for other, _ in fitting)]
    if len(outermost) != 1:
        seen = ", ".join(f"{name} ({len(m)} × {type(m[0]).__name__})" for name, m in lists if len(m)) or "none"
        raise ValueError(
            f"{type(model).__name__} counts {layers} layers, and {len(outermost)} of its module lists could be its blocks; "
            f"lists found: {seen}."
        )
    return outermost[0]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, first to last: `find_blocks(model)[i - 1]` makes layer i.

    The rule: the blocks are the outermost `nn.ModuleList` with as many members of one class as the configuration counts layers.

    Raises:
        ValueError: no such list (the message shows the lists there are), or several at the same depth of the module tree.
    """
    return list(find_block_list(model)[1])
