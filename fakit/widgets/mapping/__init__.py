"""The mapping board: layer pairs to drag, what they cost, and what to know about them."""
