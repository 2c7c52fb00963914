"""CIFAR-10 experiments."""
