"""Figures as SVG, drawn with matplotlib: what a page shows without a script."""
