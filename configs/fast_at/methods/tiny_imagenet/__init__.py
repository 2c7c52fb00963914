"""What methods have otherwise on Tiny-ImageNet."""
