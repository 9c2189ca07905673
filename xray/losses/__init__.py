"""Losses of contrastive training, of patch reconstruction and of tags; none depends on a stage."""
