"""Small programs that show what qjam is for; each runs as `python -m examples.NAME`."""
