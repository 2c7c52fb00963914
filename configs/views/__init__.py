"""Viewpoint robustness on the embedded procedural objects."""
