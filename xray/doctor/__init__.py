"""Checks of this machine, behind `xray doctor`."""
