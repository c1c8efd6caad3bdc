"""Finds user code, and decides which source, state and package data travel to hosts."""
