"""What a run watches: its cost, and the two ways in which robust training overfits."""
