"""Measurements of the platform itself, one command each."""
