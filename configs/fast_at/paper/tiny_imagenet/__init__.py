"""What papers have otherwise on Tiny-ImageNet."""
