"""Models: plain modules that know no rank and no stage."""

from xray.config import ModelConfig
from xray.models.backbone import Tokens, VisionBackbone

__all__ = ["ModelConfig", "Tokens", "VisionBackbone"]
