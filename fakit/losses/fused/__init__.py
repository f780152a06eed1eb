"""The same numbers as the plain losses, over blocks of attention and chunks of logits, and what those are given."""
