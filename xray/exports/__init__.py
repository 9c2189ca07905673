"""Artifacts in the formats of other libraries, each compared with our model before it is kept."""
