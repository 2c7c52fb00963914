"""Attacks by viewpoint: distributions of cameras under which a classifier fails, and the images seen from there."""
