"""What papers have otherwise on CIFAR-100."""
