"""Names of the folders that hold the training and the evaluation part of a data set."""

from __future__ import annotations

import re

# Evaluation sets: images/val, val/images, val2017, or captions_val beside captions_train.
HELD_OUT = re.compile(
    r"(?:^|[_-])(?:val|valid|validation|test|heldout|held_out)(?:\d{4})?$", re.IGNORECASE
)
TRAIN = re.compile(r"(?:^|[_-])(?:train|training|trainval)(?:\d{4})?$", re.IGNORECASE)


def is_held_out(path: str) -> bool:
    """Check for a folder for evaluation on the path; train/ inside val/ is for training."""
    parts = [part for part in path.split("/") if HELD_OUT.search(part) or TRAIN.search(part)]
    return bool(parts and HELD_OUT.search(parts[-1]))
