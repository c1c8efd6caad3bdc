"""Decisions without I/O: who does which slice, and what follows when something is late or lost."""
