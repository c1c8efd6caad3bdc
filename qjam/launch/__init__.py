"""Starts a node on each host, restarts it when it is lost, and ends it."""
