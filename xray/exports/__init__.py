"""Exports of artifacts to other libraries' formats, each verified against the xray model."""
