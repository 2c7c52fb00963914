"""Fast adversarial training: one gradient step of the attack a training step, and what keeps that from collapsing."""
