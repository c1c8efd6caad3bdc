"""How the node of a host is started."""
