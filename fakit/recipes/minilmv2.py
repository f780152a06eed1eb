"""MiniLMv2 (Wang et al., Findings of ACL 2021, arXiv 2012.15828)."""

from fakit.recipes.recipe import Recipe


def minilmv2(relation_heads: int | None = None) -> Recipe:
    """Relations among queries, keys and values of the last layer, in relation heads that both models share.

    Args:
        relation_heads: R; 48 for the width of BERT-base. The largest that both models can have unless given.
    """
    heads = {} if relation_heads is None else {"relation_heads": relation_heads}
    return Recipe(
        name="minilmv2",
        title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
        source="Wang et al., Findings of ACL 2021, arXiv 2012.15828",
        equation=r"""L = \sum_{X \in \{Q, K, V\}} \mathrm{mean}_{r} \, \mathrm{KL}(R^T_{X, r} \| R^S_{X, r}), \quad
            R_{X, r} = \mathrm{softmax}(X_r X_r^\top / \sqrt{d_r})""",
        settings={"layer_map": "top", "attention": {"loss": "relations", "weight": 1.0, **heads}},
        published={
            "relation heads": "48 for a teacher of 768 dimensions, 64 for 1,024",
            "teacher layer": "the last of a base model, one of the upper middle of a large one",
            "data": "general text",
        },
        ours=("the number of relation heads unless it is given", "the teacher's last layer, also of large ones"),
        evidence="6 layers of 384 dimensions: MNLI-m 82.8 from BERT-base, 84.4 from RoBERTa-large.",
    )
