"""Recipes: several stages in order, then evaluation and a report."""
