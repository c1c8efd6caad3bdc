"""A host from its name to a live node, and its fate."""
