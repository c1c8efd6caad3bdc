"""What user code is, and which of it travels to the hosts."""
