"""fakit: feature-alignment knowledge distillation of transformer language models."""
