"""The browser of recorded runs."""
