"""What methods have otherwise on CIFAR-100."""
