"""Fitting scenes, so that they can be rendered."""
