"""Other libraries, each in an environment of its own and beside the hand-written loop in its own process."""
