"""The evaluation on disk: what was asked, what happened to every sample, and sums that prove it."""
