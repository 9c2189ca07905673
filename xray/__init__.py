"""xray: one vision backbone trained in three stages, MAE, hashtags and CLIP with an LLM.

`xray.load(ARTIFACT)` returns a model that encodes images, clips and texts; see xray/api.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xray.version import __version__

if TYPE_CHECKING:
    from xray.api import Model as Model
    from xray.api import load as load

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` and `Model` on first use (PEP 562), because they need torch."""
    if name not in ("load", "Model"):
        raise AttributeError(f"module 'xray' has no attribute {name!r}")
    from xray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
