"""xray: one vision backbone trained in three stages, MAE, hashtags and CLIP with an LLM."""

__version__ = "0.1.0"
