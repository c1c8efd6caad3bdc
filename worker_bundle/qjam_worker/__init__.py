"""What is copied to every host. It needs Python >= 3.9, pyzmq, msgpack, msgpack-numpy and numpy.

It never imports qjam.
"""
