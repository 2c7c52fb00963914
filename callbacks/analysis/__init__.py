"""Callbacks that show what a network does."""
