"""Run a model and keep what was asked: hidden states, attention inputs, logits or the head in their place."""
