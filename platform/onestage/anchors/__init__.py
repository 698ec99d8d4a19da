"""Anchors: pure functions of level shapes and strides, in input pixels."""
