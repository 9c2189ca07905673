"""Ablations: a grid of runs over seeds, what they share, and their comparison."""
