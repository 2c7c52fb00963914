"""Pure functions of tensors. Nothing here imports Lightning."""
