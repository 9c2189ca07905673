"""From webdataset shards to batches: a pure function of (seed, manifest, step)."""
