"""What a step allocates and multiplies, seen by running it on tensors that have a shape and no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_LOGIC = {
    _aten.zeros: lambda *_: False,
    _aten.bitwise_not: lambda x: not x,
    _aten.bitwise_and: lambda x, y: x and y,
    _aten.bitwise_or: lambda x, y: x or y,
}
_CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class Ledger(TorchDispatchMode):
    """Keeps the books of whatever runs inside: every storage's birth and end, and FLOPs, by phase.

    To be opened inside a `FakeTensorMode`. Questions about values, which fake tensors cannot answer, are answered with
    yes, 1, and "everywhere" (masks that come of zeros and negations: "nowhere"): losses are finite,
    every position counts.

    Attributes:
        phase: the name under which what happens now is booked.
        flops: (phase, "single" or "half") → FLOPs by the precision of their result, counted as torch's FlopCounterMode
            counts: a multiply-add is 2; products, convolutions and attention alone.
        written: phase → bytes of all results.
        repeat: FLOPs and bytes of what happens now are counted so many times.
    """

    def __init__(self):
        super().__init__()
        self.phase = "models"
        self.flops: Counter[tuple[str, str]] = Counter()
        self.written: Counter[str] = Counter()
        self.repeat = 1.0
        self._alive: dict[int, tuple[weakref.ref, int, str]] = {}  # address of a storage → (itself, number, phase)
        self._sizes: list[int] = []  # by number of a storage
        self._false = WeakIdKeyDictionary()  # masks known to be False everywhere; others count as True everywhere
        self._events: list[tuple[int, int]] = []  # (number of a storage, its bytes at birth, minus them at its end)
        self._phases: list[str] = []  # by number of a storage
        self._moved: dict[int, list[tuple[int, str]]] = {}  # number of a storage → (from this event on, booked as this)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; shielding every call from the compiler would take a tenth of the time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is _aten._local_scalar_dense:
            return True if args[0].dtype == torch.bool else 1 if not args[0].is_floating_point() else 1.0
        if packet in (_aten.is_nonzero, _aten.equal, _aten.allclose):
            return True
        if packet is _aten.nonzero:
            found = args[0].numel() if self._true(args[0]) else 0
            result = torch.empty(found, args[0].dim(), dtype=torch.long, device=args[0].device)
        elif packet is _aten._grouped_mm:  # fake tensors know the products of a mixture's experts in bf16 alone
            result = torch.empty(_grouped_shape(*args, **kwargs), dtype=args[0].dtype, device=args[0].device)
        else:
            result = func(*args, **kwargs)
        if packet in _LOGIC and result.dtype == torch.bool and not _LOGIC[packet](*map(self._true, args[:2])):
            self._false[result] = True
        if flops := _flops(packet, args, kwargs, result):
            first = result if isinstance(result, Tensor) else result[0]
            precision = "single" if first.dtype in (torch.float32, torch.float64) else "half"
            self.flops[self.phase, precision] += self.repeat * flops
        self.book(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _true(self, mask: object) -> bool:
        return not (isinstance(mask, Tensor) and mask in self._false)

    def book(self, tensors: Iterable[Tensor]) -> None:
        """Enter the storages of these tensors that are not in the books yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                number, size = len(self._phases), storage.nbytes()
                reference = weakref.ref(storage, lambda _, key=key, number=number: self._end(key, number))
                self._alive[key] = reference, number, self.phase
                self._phases.append(self.phase)
                self._sizes.append(size)
                self._events.append((number, size))
                self.written[self.phase] += self.repeat * size

    def move(self, phase: str, tensors: Iterable[Tensor] | None = None, booked: str | None = None) -> None:
        """From now on, these tensors (or all that are alive and were booked under `booked`) count under `phase`."""
        keys = list(self._alive) if tensors is None else [tensor.untyped_storage()._cdata for tensor in tensors]
        for key in keys:
            if key in self._alive and (booked is None or self._alive[key][2] == booked):
                reference, number, _ = self._alive[key]
                self._alive[key] = reference, number, phase
                self._moved.setdefault(number, []).append((len(self._events), phase))

    def claim(self, phase: str, tensors: Iterable[Tensor]) -> None:
        """Book these tensors under `phase` from their birth on."""
        for tensor in tensors:
            self._phases[self._alive[tensor.untyped_storage()._cdata][1]] = phase

    def peak(self) -> dict[str, int]:
        """phase → bytes, at the moment when most were alive."""
        total = best = at = 0
        for place, (_, size) in enumerate(self._events):
            total += size
            if total > best:
                best, at = total, place
        parts: Counter[str] = Counter()
        for number, size in self._events[: at + 1]:
            phase = self._phases[number]
            for since, moved in self._moved.get(number, ()):
                phase = moved if since <= at + 1 else phase
            parts[phase] += size
        return {name: size for name, size in parts.items() if size}

    def _end(self, key: int, number: int) -> None:
        if key in self._alive and self._alive[key][1] == number:
            del self._alive[key]
            self._events.append((number, -self._sizes[number]))


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_, **__) -> tuple[int, ...]:
    """The shape of products of groups of rows (or of columns) of a and b."""
    if a.dim() == b.dim() == 2:
        return offs.numel(), a.shape[0], b.shape[1]
    return (*a.shape[:-1], b.shape[-1]) if a.dim() == b.dim() or a.dim() == 2 else (a.shape[1], b.shape[-1])


def _flops(packet, args, kwargs, result) -> int:
    if packet is _CPU_ATTENTION or packet is _CPU_ATTENTION_BACKWARD:
        # the counter has no formula for the CPU's kernel: two products forward, four backward, of all pairs of tokens
        query, key, value = args[:3] if packet is _CPU_ATTENTION else args[1:4]
        batch, heads, rows, width = query.shape
        once = 2 * batch * heads * rows * key.shape[2] * (width + value.shape[3])
        return once if packet is _CPU_ATTENTION else 2 * once
    if packet is _aten._grouped_mm:  # nor for a mixture's experts, each of which sees its share of the rows
        a, b = args[:2]
        rows, inner, columns = (a.shape[0], a.shape[1], b.shape[-1]) if a.dim() == 2 else (*a.shape[-2:], b.shape[-1])
        return 2 * rows * inner * columns * (a.shape[0] if a.dim() == b.dim() == 3 else 1)
    formula = flop_registry.get(_aten.mm if packet is _aten._int_mm else packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)
