"""The survey's map."""
