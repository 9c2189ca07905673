"""Memory, FLOPs and time of a run, estimated without a GPU or data: `xray plan`."""
