"""Checks of whole shards, behind `xray data check` and `xray data stats`."""
