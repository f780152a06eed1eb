"""BERT-EMD (Li et al., EMNLP 2020, arXiv 2010.06133)."""

from fakit.recipes.recipe import Recipe


def bert_emd() -> Recipe:
    """Every student layer learns from every teacher layer, by the cheapest flow between them."""
    return Recipe(
        name="bert_emd",
        title="BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance",
        source="Li et al., EMNLP 2020, arXiv 2010.06133",
        equation=r"""L = \sum_{st} F_{st} D_{st} + \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + \mathrm{CE}, \quad
            D_{st} = \mathrm{MSE}(H^S_s W, H^T_t), \quad F = \mathrm{argmin} \sum_{st} F_{st} D_{st}""",
        settings={
            "layer_map": "every",
            "outputs": {"loss": "forward_kl", "temperature": 1.0, "weight": 1.0},
            "task_weight": 1.0,
            "terms": {"layers": {"kind": "earth_mover", "loss": "mse", "weight": 1.0}},
        },
        published={"attention": "a flow of its own between attention maps, and the embeddings' MSE, beside this one"},
        ours=(
            "hidden states alone: no flow between attention maps, no term for the embeddings",
            "all weights and the temperature",
        ),
    )
