"""Captions of samples, and stored sentence vectors."""
