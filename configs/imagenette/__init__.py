"""Experiments on Imagenette's files."""
