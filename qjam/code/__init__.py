"""Finds user code and decides which source is sent to hosts."""
