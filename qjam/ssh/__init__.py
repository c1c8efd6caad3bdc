"""Connect and log in as OpenSSH would."""
