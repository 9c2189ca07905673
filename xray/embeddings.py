"""Public name of the reader of embedding files."""

from xray.search.embedding_file import open_embeddings

__all__ = ["open_embeddings"]
