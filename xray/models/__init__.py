"""Models as plain `nn.Module`s, independent of ranks and training stages."""

from xray.config import ModelConfig
from xray.models.backbone import Tokens, VisionBackbone

__all__ = ["ModelConfig", "Tokens", "VisionBackbone"]
