"""What a method's own paper has otherwise than the protocol."""
