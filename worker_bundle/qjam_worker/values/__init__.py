"""Values to bytes and back, and adding them up."""
