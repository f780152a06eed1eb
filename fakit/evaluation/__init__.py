"""Evaluation: what a student can do, how close it is to its teacher, and what it costs.

    metrics            accuracy, F1, Matthews, Pearson, Spearman, BLEU, ROUGE, CER
    language_modeling  perplexity and bits per byte over a corpus
    calibration        expected calibration error, NLL, Brier, reliability bins
    fidelity           agreement with the teacher: top-1, KL, CR@k, MOR@k, attention JSD
    quantization       a quantized teacher against the full one, layer by layer
    generation         greedy decoding, samples, the copy-the-input baseline
    drafts             a student as a draft of its teacher in speculative decoding
    cost               parameters, FLOPs, latency, peak memory
    attribution        layer integrated gradients for two models, compared
    evaluator          `evaluate`: the numbers that belong to a task, in one call

Every name below is imported from its module at first use, so that `import fakit.evaluation` loads neither scikit-learn
nor captum.
"""

import importlib

_HOME = {
    "metrics": ("Score", "accuracy", "aligned", "bleu", "cer", "f1", "matthews", "pearson", "rouge", "spearman"),
    "language_modeling": ("Perplexity", "perplexity"),
    "calibration": (
        "Reliability",
        "brier_score",
        "expected_calibration_error",
        "negative_log_likelihood",
        "reliability",
    ),
    "fidelity": ("Agreement", "AttentionDivergence", "attention_jsd", "ranking_agreement"),
    "quantization": ("LayerFidelity", "QuantizationFidelity", "quantization_fidelity", "weight_bytes"),
    "generation": ("Generations", "ends_of", "generate", "generation_metrics", "split_prompts"),
    "drafts": ("DraftQuality", "DraftedText", "draft_quality", "drafted_texts"),
    "cost": (
        "Latency",
        "costs",
        "count_flops",
        "count_parameters",
        "forward_flops",
        "latency",
        "peak_memory",
        "training_flops",
    ),
    "attribution": ("Attributions", "attribute", "compare", "deletion"),
    "evaluator": ("evaluate", "predictions"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
