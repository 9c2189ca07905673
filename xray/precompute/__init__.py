"""Jobs that run a model over shards and write what it says of each sample as sidecars."""
