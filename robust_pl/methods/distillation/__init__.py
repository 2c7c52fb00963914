"""Robust distillation: a student learns from teachers that are already trained."""
