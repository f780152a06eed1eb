"""The layer maps that a widget offers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fakit.layer_maps import LayerMap

STRATEGIES: dict[str, Callable[[int, int], LayerMap]] = {
    "uniform": LayerMap.uniform,
    "last": LayerMap.last,
    "first": LayerMap.first,
    "skip": LayerMap.skip,
    "reverse": LayerMap.reverse,
    "all_to_one": LayerMap.all_to_one,
    "random": LayerMap.random,
    "none": LayerMap.none,
}


def offered(
    student_layers: int, teacher_layers: int, similarity: Sequence[Sequence[float]] | None = None
) -> tuple[dict[str, LayerMap], dict[str, str]]:
    """The maps that these depths allow, by name, and those that they do not, each with the reason.

    Args:
        student_layers, teacher_layers: depths, embeddings not counted.
        similarity: (S + 1) × (T + 1) by layer number; adds "similarity (monotone)" and "similarity (assignment)".

    Raises:
        ValueError: depths below 1, for which there is no map at all.

    >>> maps, refused = offered(3, 2)
    >>> list(maps), refused["last"]
    (['uniform', 'skip', 'reverse', 'all_to_one', 'none'], 'last gives each of 3 student layers its own teacher layer, \
and the teacher has 2; use LayerMap.uniform, which may use a layer twice.')
    """
    builders = {name: lambda build=build: build(student_layers, teacher_layers) for name, build in STRATEGIES.items()}
    if similarity is not None:
        for method in ("monotone", "assignment"):
            name = f"similarity ({method})"
            builders[name] = lambda method=method: LayerMap.from_similarity(similarity, method)
    maps: dict[str, LayerMap] = {}
    refused: dict[str, str] = {}
    for name, build in builders.items():
        try:
            maps[name] = build()
        except ValueError as error:  # `skip` for one layer, `last` for a student deeper than its teacher
            refused[name] = str(error)
    if "uniform" not in maps:
        raise ValueError(refused["uniform"])
    return maps, refused
