"""Evaluation without a Trainer, and loading of what was trained."""
