"""What a user's data looks like as slices, each with the hash of its content."""
