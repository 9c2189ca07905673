"""Pictures of a model's kept tokens, attention and reconstructions."""
