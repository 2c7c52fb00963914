"""Experiments on the embedded digits."""
