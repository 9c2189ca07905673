"""Imports of released weights as artifacts, one file per family of models."""
