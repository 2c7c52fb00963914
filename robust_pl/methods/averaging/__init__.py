"""Methods whose result is an average of weights, or a sum of them: trainable averages, soups, weight arithmetic."""
