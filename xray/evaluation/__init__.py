"""Evaluation of artifacts: suites in one file each, their data sets, and their results."""
