"""Curation of a pool of captioned images or clips, as in MetaCLIP; start reading at `curate.py`."""
