"""Hostile input: mutated messages for the master, for nodes, and for all that reads bytes from elsewhere.

`python -m tests.fuzzing --messages 1000000` from the root of the repository; `--help` tells the rest.
"""
