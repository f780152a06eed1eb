"""Hidden states between two blocks, on disk: what one block gave waits there until the next is trained."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# what states are stored in, and what numpy, which has no bfloat16, takes their bits for
STORED = {
    "float32": (torch.float32, np.float32),
    "float16": (torch.float16, np.float16),
    "bfloat16": (torch.bfloat16, np.int16),
}


class States:
    """Hidden states of all batches in a file, of which a batch at a time is mapped into memory.

    Args:
        shapes: of the batches, (B, T, d).
        like: dtype and device that they are given back in.
        new: make the file.
    """

    def __init__(self, path: Path, shapes: list[tuple[int, int, int]], stored: str, like: Tensor, new: bool):
        self.path, self.shapes, self.like = path, shapes, like
        self.dtype, self.bits = STORED[stored]
        sizes = [int(np.prod(shape)) * np.dtype(self.bits).itemsize for shape in shapes]
        self.starts = [0, *np.cumsum(sizes).tolist()]
        if new:
            with path.open("wb") as file:
                file.truncate(self.starts[-1])

    def _mapped(self, b: int, mode: str) -> np.memmap:
        return np.memmap(self.path, self.bits, mode, self.starts[b], self.shapes[b])

    def __getitem__(self, b: int) -> Tensor:
        bits = torch.from_numpy(np.array(self._mapped(b, "r")))
        return bits.view(self.dtype).to(self.like.device, self.like.dtype)

    def put(self, b: int, x: Tensor) -> Tensor:
        """Write a batch; what is read again."""
        kept = x.detach().to("cpu", self.dtype)
        mapped = self._mapped(b, "r+")
        mapped[:] = (kept.view(torch.int16) if self.bits is np.int16 else kept).numpy()
        mapped.flush()
        return kept.to(self.like.device)
