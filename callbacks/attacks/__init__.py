"""One file an attack, and what they share."""
