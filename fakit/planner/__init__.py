"""The planner: memory, FLOPs and time of a distillation step, from configurations alone.

    print(plan("meta-llama/Llama-3.1-8B", "8x2048", batch=4, seq=512, quantize="8bit", memory="A100 40GB"))

The step is run on fake tensors (shapes without data), so what is counted is what the kit does,
for any family and any objective.
"""

import importlib

_WHERE = {
    "CARDS": "cards",
    "Card": "cards",
    "find_card": "cards",
    "Plan": "planning",
    "plan": "planning",
    "PRESETS": "presets",
    "read_config": "presets",
    "OPTIMIZERS": "step",
    "TERMS": "step",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"fakit.planner has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"fakit.planner.{_WHERE[name]}"), name)
