"""Tables of parameter names: ours and those of another library, one file per family.

Imports read a table from right to left, exports from left to right.
"""
