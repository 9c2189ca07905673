"""Models: plain modules that know no rank and no stage."""

from xray.models.backbone import VisionBackbone

__all__ = ["VisionBackbone"]
