"""What happens to weights beside the optimizer: perturbations, averages, trajectories. Usable with every method."""
