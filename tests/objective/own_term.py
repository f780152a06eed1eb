"""A term that is nowhere in the kit: what a notebook or a paper would add."""

import torch
from torch import Tensor

from fakit import Term


class Contrastive(Term):
    """Each token's student state picks the teacher's state of the same token out of the text's (InfoNCE,
    van den Oord et al. 2018).
    """

    def __init__(self, student_layer: int = 2, teacher_layer: int = 3, scale: float = 10.0, weight: float = 1.0):
        self.layers = {"student": student_layer, "teacher": teacher_layer}
        self.scale, self.weight = scale, weight

    def needs(self, side: str) -> dict:
        return {"hidden_states": [self.layers[side]]}

    def compare(self, student, teacher, labels: Tensor | None) -> Tensor:
        ours, theirs = student.hidden_states[self.layers["student"]], teacher.hidden_states[self.layers["teacher"]]
        width = min(ours.shape[-1], theirs.shape[-1])
        ours, theirs = (torch.nn.functional.normalize(x[..., :width], dim=-1) for x in (ours, theirs))  # (B, T, d)
        scores = (self.scale * ours @ theirs.mT).masked_fill(~student.mask[:, None], -1e9)  # (B, T, T)
        return -scores.log_softmax(-1).diagonal(dim1=1, dim2=2)[student.mask].mean()
