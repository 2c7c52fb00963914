"""Analyses of a test, added to any experiment."""
