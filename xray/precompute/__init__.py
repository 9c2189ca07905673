"""Jobs that run a model over shards and write its output for each sample to sidecars."""
