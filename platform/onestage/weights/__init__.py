"""Weights that people have, read and written in their authors' formats."""
