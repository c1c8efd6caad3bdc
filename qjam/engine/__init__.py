"""The loop that owns the ROUTER and carries out what dispatch decides."""
