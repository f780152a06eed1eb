"""DistillKit's compressed log-probabilities, read by the settings that they were written with.

The k largest of a distribution, in falling order, are two strings of bytes a token (arcee-ai/DistillKit, commit
a61c2e7, `distillkit/compression`; a set's README or capture configuration says the settings):

* `bytepacked_indices`: k numbers of ⌈log2 d⌉ bits each, the highest bit first, filled up to whole bytes.
* `compressed_logprobs`: `exact_k` numbers of `exact_dtype`; a coefficient of `term_dtype` for each of
  `polynomial_terms`; then of each of `residual_bins` a scale of `scale_dtype` and `num_elements` numbers of
  `element_bits` bits. Numbers of b bits are q - 2^(b-1), of one bit 2q - 1. Little-endian.

    x_i = exact_i for i < exact_k,  x_i = Σ_j c_j f_j(t) + scale · number  behind, t = i - exact_k

with f_j(t) = t^j, √t or e^t, t from 0 on, or evenly in 0 … 1 (`normalize_t`); what no bin holds has no residual. With
`delta_encoding` the log-probabilities are the running sums of x, else x itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")  # of its earlier format
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}
_KEYS = {
    "d": None,
    "k": None,
    "exact_k": None,
    "exact_dtype": "float32",
    "polynomial_terms": None,
    "term_dtype": "float32",
    "residual_bins": None,
    "delta_encoding": True,
    "error_diffusion": False,
    "normalize_t": False,
}


@dataclass(frozen=True)
class Compression:
    """Settings of DistillKit's DistributionQuantizationConfig, by its names.

    Attributes:
        d: the size of the vocabulary. k: log-probabilities a token.
        exact_k, exact_dtype: how many are stored as they are, and as what.
        polynomial_terms, term_dtype: powers, "sqrt" or "exp", and what their coefficients are.
        residual_bins: (scale dtype, bits, elements) each.
        delta_encoding, normalize_t: see above.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[int | str, ...]
    term_dtype: str
    residual_bins: tuple[tuple[str, int, int], ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Compression":
        """From the mapping that stands in DistillKit's configuration.

        Raises:
            ValueError: an unknown or missing key, or a value that no such set can have.
        """
        if unknown := [key for key in settings if key not in _KEYS]:
            raise ValueError(f"compression: unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}.")
        if missing := [key for key in ("d", "k", "exact_k", "residual_bins") if settings.get(key) is None]:
            raise ValueError(f"compression: {', '.join(missing)} is missing; found {', '.join(settings)}.")
        given = {**_KEYS, **settings}
        bins = tuple((one["scale_dtype"], one["element_bits"], one["num_elements"]) for one in given["residual_bins"])
        terms = tuple(given["polynomial_terms"] or ())
        dtypes = [given["exact_dtype"], given["term_dtype"], *(dtype for dtype, *_ in bins)]
        behind = given["k"] - given["exact_k"]
        fits = behind >= 0 and sum(number for *_, number in bins) <= behind and (terms or bins or not behind)
        known = all(isinstance(term, int) or term in _TERMS for term in terms)
        bits = all(1 <= one <= 32 for _, one, _ in bins)
        if not fits or not known or not bits or any(dtype not in _DTYPES for dtype in dtypes):
            raise ValueError(
                f"compression: {dict(settings)} describes no set: bins hold {sum(n for *_, n in bins)} of the {behind} "
                f"numbers behind exact_k, in 1 to 32 bits; terms are whole numbers, {', '.join(_TERMS)}; dtypes are "
                f"{', '.join(_DTYPES)}."
            )
        return cls(
            given["d"],
            given["k"],
            given["exact_k"],
            given["exact_dtype"],
            terms,
            given["term_dtype"],
            bins,
            given["delta_encoding"],
            given["normalize_t"],
        )

    @property
    def index_bits(self) -> int:
        """Of one token's number."""
        return max(1, (self.d - 1).bit_length())

    @property
    def bytes_of_values(self) -> int:
        """Of the log-probabilities of one token."""
        found = self.exact_k * _DTYPES[self.exact_dtype].itemsize
        found += len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize
        return found + sum(
            _DTYPES[dtype].itemsize + -(-bits * number // 8) for dtype, bits, number in self.residual_bins
        )

    def read(self, values: Sequence, indices: Sequence, where: str) -> tuple[Tensor, Tensor]:
        """`bytepacked_indices` and `compressed_logprobs` of a text: tokens int64 (n, k), and float64 (n, k).

        Raises:
            ValueError: strings of another length than the settings say.
        """
        found = []
        expected = {COMPRESSED[0]: self.bytes_of_values, COMPRESSED[1]: -(-self.k * self.index_bits // 8)}
        for (name, size), rows in zip(expected.items(), (values, indices), strict=True):
            if wrong := next((len(row) for row in rows if len(row) != size), None):
                raise ValueError(
                    f"{where}: {name} has {wrong} bytes a token, and by the settings given (d {self.d}, k {self.k}, "
                    f"exact_k {self.exact_k} …) it has {size}; give those that the set was written with."
                )
            found.append(torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), size))
        packed, numbers = found
        return unpacked(numbers, self.index_bits, self.k), self._values(packed)

    def _values(self, packed: Tensor) -> Tensor:
        """(n, bytes) -> float64 (n, k)"""
        place = 0

        def taken(dtype: str, number: int) -> Tensor:
            nonlocal place
            size = number * _DTYPES[dtype].itemsize
            part, place = packed[:, place : place + size].clone(memory_format=torch.contiguous_format), place + size
            return part.view(_DTYPES[dtype]).reshape(len(packed), number)

        exact = taken(self.exact_dtype, self.exact_k).double()
        behind = self.k - self.exact_k
        rest = torch.zeros(len(packed), behind, dtype=torch.float64)
        if self.polynomial_terms:
            coefficients = taken(self.term_dtype, len(self.polynomial_terms)).double()
            t = torch.linspace(0, 1, behind) if self.normalize_t else torch.arange(behind)
            t = t.to(_DTYPES[self.term_dtype])  # terms are rounded as they were for the fit
            terms = [t**term if isinstance(term, int) else _TERMS[term](t) for term in self.polynomial_terms]
            rest = coefficients @ torch.stack(terms).double()
        first = 0
        for dtype, bits, number in self.residual_bins:
            scale, size = taken(dtype, 1).double(), -(-bits * number // 8)
            whole = unpacked(packed[:, place : place + size], bits, number).double()
            place += size
            rest[:, first : first + number] += scale * (2 * whole - 1 if bits == 1 else whole - 2 ** (bits - 1))
            first += number
        found = torch.cat([exact, rest], 1)
        return found.cumsum(1) if self.delta_encoding else found


def unpacked(packed: Tensor, bits: int, number: int) -> Tensor:
    """Whole numbers of so many bits, the highest first, from bytes. uint8 (n, ⌈number · bits / 8⌉) -> int64 (n, number)

    >>> unpacked(torch.tensor([[0b00101_010, 0b11_000000]], dtype=torch.uint8), bits=5, number=2).tolist()
    [[5, 11]]
    """
    each = (packed.long().unsqueeze(-1) >> torch.arange(7, -1, -1)) & 1  # (n, bytes, 8)
    each = each.flatten(1)[:, : number * bits].unflatten(1, (number, bits))
    return (each << torch.arange(bits - 1, -1, -1)).sum(-1)
