"""The training loop of a stage, its checkpoints and its metrics."""
