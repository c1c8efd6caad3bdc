"""Messages to frames and back, and the sockets that carry them."""
