"""MiniLM (Wang et al., NeurIPS 2020, arXiv 2002.10957)."""

from fakit.recipes.recipe import Recipe


def minilm() -> Recipe:
    """The last layer alone: where it attends, and how its values lie to each other."""
    return Recipe(
        name="minilm",
        title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        source="Wang et al., NeurIPS 2020, arXiv 2002.10957",
        equation=r"""L = \mathrm{KL}(A^T \| A^S) + \mathrm{KL}(R^T \| R^S), \quad
            R = \mathrm{softmax}(V V^\top / \sqrt{d_h}) \quad \text{of the last layers}""",
        settings={"layer_map": "top", "attention": {"loss": "minilm", "weight": 1.0}},
        published={"student": "as many attention heads as the teacher; any depth and width", "data": "general text"},
        ours=(
            "its form, from memory of the paper",
            "the mean over heads and queries",
        ),
        evidence="6 layers of 384 dimensions: see MiniLMv2, which replaced it.",
    )
