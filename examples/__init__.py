"""Small programs and jobs that show what qjam is for. Those with a `main` run as `python -m examples.NAME`."""
