"""Evaluations of artifacts, each a function from features to numbers beside chance."""
