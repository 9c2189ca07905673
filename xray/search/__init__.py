"""Embedding files, the job that writes them, and exact search over them."""
