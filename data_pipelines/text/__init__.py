"""Captions of samples, and stored text features of captions."""
