"""The parties of `qjam-bench calls`."""
