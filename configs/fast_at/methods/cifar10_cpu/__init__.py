"""What methods have otherwise on CIFAR-10 at the scale of a CPU."""
