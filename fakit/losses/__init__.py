"""Pure functions of tensors and masks: one loss, one small function, the equation beside the line.

`features` compares hidden states (B, T, d), `relational` how their tokens lie to each other, `attention` maps
(B, H, T, T), `outputs` logits (B, T, V) or (B, C). Every loss is a scalar, a mean over what counts, computed in float32
or better, and 0 where student equals teacher, unless its docstring says otherwise (`l1_cosine`, `codir`).
"""

from fakit.losses import attention, features, outputs, relational

__all__ = ["attention", "features", "outputs", "relational"]
