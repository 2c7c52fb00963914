"""What each method adds to a base of the protocol."""
