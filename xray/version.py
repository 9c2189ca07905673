"""Version of xray, read by setup.cfg and written into every artifact."""

__version__ = "0.1.0"
