"""Shards: webdataset tars with an index, side files, and remote copies."""
