"""Shards: webdataset tars, their indexes and manifests, sidecars, and the cache of remote tars."""
