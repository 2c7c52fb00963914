"""Recipes on ImageNet, most of them those of EasyRobust."""
