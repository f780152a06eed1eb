"""TinyBERT (Jiao et al., Findings of EMNLP 2020, arXiv 1909.10351)."""

from fakit.recipes.recipe import Recipe


def tinybert() -> Recipe:
    """Embeddings, hidden states and attention scores first; then the teacher's soft labels."""
    first_half = {"from": 1.0, "to": 0.0, "kind": "steps", "milestones": [0.5]}
    second_half = {"from": 0.0, "to": 1.0, "kind": "steps", "milestones": [0.5]}
    return Recipe(
        name="tinybert",
        title="TinyBERT: Distilling BERT for Natural Language Understanding",
        source="Jiao et al., Findings of EMNLP 2020, arXiv 1909.10351",
        equation=r"""L_1 = \mathrm{MSE}(E^S W_e, E^T) + \mathrm{mean}_j \, \mathrm{MSE}(H^S_j W_h, H^T_{g(j)})
            + \mathrm{mean}_j \, \mathrm{MSE}(A^S_j, A^T_{g(j)}), \quad L_2 = \mathrm{CE}(P, Q)""",
        settings={
            "layer_map": "uniform",
            "features": {"loss": "mse", "shared": True, "weight": first_half},
            "attention": {"loss": "score_mse", "weight": first_half},
            "outputs": {"loss": "forward_kl", "temperature": 1.0, "weight": second_half},
            "terms": {"embeddings": {"kind": "features", "loss": "mse", "layer_map": [[0, 0]], "weight": first_half}},
        },
        published={
            "two stages": "20 epochs of the layers, then 3 of the prediction layer, each with an optimizer of its own",
            "student": "4 layers of 312 dimensions, first distilled on general text",
            "augmentation": "20 texts a labeled one, words exchanged",
        },
        ours=(
            "both stages in one training, half of the steps each, with one optimizer and one learning rate schedule",
            "the mean over layers, where the paper sums them",
            "one matrix W_h for all layers, as theirs; the embeddings have their own",
        ),
        evidence="4 layers: GLUE test mean 77.0 of 79.5, 6 layers 79.4; without the losses of the layers 56.3 (dev).",
    )
