"""Artifacts: the result of a stage on disk, its lineage, and the models read from it."""
