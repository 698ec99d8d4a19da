"""Boxes: formats, overlaps and suppression. Pure functions of tensors."""
