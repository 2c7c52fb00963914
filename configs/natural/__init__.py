"""Experiments of training for natural robustness."""
