"""Losses, and which anchors count in them."""
