"""The places inside of a block's MLP, found in what its linear layers are given and give while it runs."""

from dataclasses import dataclass, field

from torch import Tensor, nn

PLACES = {"mlp_outputs": "MLP output", "mlp_ups": "up projection", "mlp_gates": "gate projection"}


@dataclass
class MlpWatch:
    """What one block's linear layers were given and gave, in the order in which they ran.

    The rule: the MLP's layers are those after the output projection of the block's last attention, which is the first
    one after the attention function, but for a gate on it (given what a layer before was). The MLP's last layer gives
    the output. Of two layers before it, the gate is the one whose result goes into an activation by itself; a single
    one is the up projection.
    """

    block_input: Tensor
    given: list[Tensor] = field(default_factory=list)  # to layers before the last attention
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (given, result) since then, or since the start
    activated: list[Tensor] = field(default_factory=list)
    attended: bool = False
    inside: nn.Module | None = None  # the layer that runs; those in it (of an adapter) are its own business

    def attention(self) -> None:
        """An attention function was called."""
        self.given += [given for given, _ in self.layers]
        self.layers, self.attended = [], True

    def places(self) -> tuple[dict[str, Tensor], str]:
        """{place: tensor} of those that the block has, and in words what its MLP looks like."""
        if not self.attended:
            return {}, "its block did not attend, so that it cannot be seen where its MLP begins"
        projection = next((i for i, (x, _) in enumerate(self.layers) if not _is_any(x, self.given)), len(self.layers))
        layers = self.layers[projection + 1 :]
        if len(layers) not in (2, 3) or self._by_token(layers[-1][1]).shape != self.block_input.shape:
            shown = ", ".join(str(tuple(out.shape)) for _, out in layers) or "none"
            return {}, (
                "an MLP is two or three linear layers after the attention's, the last of which gives "
                f"{tuple(self.block_input.shape)}; its block has {shown} there (experts, several MLPs, layers of "
                "another kind)"
            )
        *inner, (given, output) = layers
        found = {"mlp_outputs": self._by_token(output)}
        if any(out.shape[-1] != given.shape[-1] for _, out in inner):
            return found, "its MLP makes gate and up in one linear layer"
        gates = [out for _, out in inner if _is_any(out, self.activated)]
        if len(inner) == 1:
            found |= {"mlp_ups": self._by_token(inner[0][1])}
            return found, "its MLP has one linear layer before its last, and so no gate"
        if len(gates) != 1:
            return found, "it cannot be seen which of its MLP's two linear layers goes through the activation"
        up = next(out for _, out in inner if out is not gates[0])
        return found | {"mlp_gates": self._by_token(gates[0]), "mlp_ups": self._by_token(up)}, ""

    def _by_token(self, x: Tensor) -> Tensor:
        """(B, T, d), also where the MLP works on (B · T, d) (OPT)."""
        B, T = self.block_input.shape[:2]
        return x.unflatten(0, (B, T)) if x.dim() == 2 and len(x) == B * T else x


def is_activation(module: nn.Module) -> bool:
    """A module that has nothing of its own and is no dropout."""
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return leaf and not isinstance(module, nn.Dropout | nn.Identity)


def _is_any(x: Tensor, others: list[Tensor]) -> bool:
    return any(x is other for other in others)
