"""Ablations: a grid of runs over arms and seeds, their shared stage runs, and their comparison."""
