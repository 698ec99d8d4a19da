"""Readers of the formats that people keep their annotations in, each into a ``Source``."""
