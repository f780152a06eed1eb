"""Patient knowledge distillation (Sun et al., EMNLP 2019, arXiv 1908.09355)."""

from fakit.recipes.recipe import Recipe


def pkd() -> Recipe:
    """The first token's hidden state in every mapped layer, normalized, beside soft labels and the task."""
    return Recipe(
        name="pkd",
        title="Patient Knowledge Distillation for BERT Model Compression",
        source="Sun et al., EMNLP 2019, arXiv 1908.09355",
        equation=r"""L = (1 - \alpha) \, \mathrm{CE} + \alpha \, \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau)
            + \beta \, \mathrm{mean}_j \| u^S_j - u^T_{g(j)} \|^2 / d, \quad
            u = h / \| h \| \text{ of the first token}""",
        settings={
            "layer_map": "skip",
            "outputs": {"loss": "forward_kl", "temperature": 10.0, "weight": 0.7},
            "task_weight": 0.3,
            "terms": {"patient": {"kind": "pooled", "loss": "normalized_mse", "pool": "first", "weight": 500.0}},
        },
        published={
            "searched": "α in 0.2, 0.5, 0.7; β in 10, 100, 500, 1000; τ in 5, 10, 20",
            "student": "the first layers, copied",
        },
        ours=("one point of the searched grid", "the first token, which is [CLS] where the tokenizer has one"),
        evidence="BERT-base to 4 layers: GLUE test mean 72.6 of 79.5. The skip map is slightly ahead of the last one.",
    )
