"""Training on rendered views of objects, so that a classifier no longer minds where they are seen from."""
