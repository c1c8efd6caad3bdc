"""One process that runs user code, and the server that forks it."""
