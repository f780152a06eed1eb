"""What teacher and student share: CKA with its uncertainty, measures beside it, and the similarity of attention heads.

cka(x, y)                                    one pair of features (n, p), (n, q)
StreamingCKA().update(students, teachers, mask).matrix()   all layer pairs, one pass, constant memory
compare_layers(students, teachers, mask)     all layer pairs of tokens, with null band and interval
"""

from .attention import (
    HeadMatching,
    attention_entropy,
    attention_rollout,
    attention_similarity,
    head_distance,
    induction_score,
    match_heads,
    previous_token_score,
    sink_share,
)
from .cka import cka, cka_matrix, hsic
from .estimators import compare_estimators
from .measures import RogueDimensions, cknna, mutual_knn, procrustes, pwcca, rogue_dimensions, rsa, svcca
from .results import Similarity, SimilarityMatrix
from .rogue import RogueScrub, scrub_rogue
from .streaming import MinibatchCKA, StreamingCKA
from .uncertainty import LayerComparison, compare, compare_layers

__all__ = [
    "HeadMatching",
    "LayerComparison",
    "MinibatchCKA",
    "RogueDimensions",
    "RogueScrub",
    "Similarity",
    "SimilarityMatrix",
    "StreamingCKA",
    "attention_entropy",
    "attention_rollout",
    "attention_similarity",
    "cka",
    "cka_matrix",
    "cknna",
    "compare",
    "compare_estimators",
    "compare_layers",
    "head_distance",
    "hsic",
    "induction_score",
    "match_heads",
    "mutual_knn",
    "previous_token_score",
    "procrustes",
    "pwcca",
    "rogue_dimensions",
    "rsa",
    "scrub_rogue",
    "sink_share",
    "svcca",
]
