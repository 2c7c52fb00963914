"""The protocol of the FastAT benchmark: one base a data set."""
