"""Choosing from a pool of captioned pictures or clips, as MetaCLIP does; begin at `curate.py`."""
