"""What is copied to every host. It needs Python >= 3.9, pyzmq, msgpack and numpy, and never imports qjam."""
