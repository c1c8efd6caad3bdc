"""Starts pyzmq's own thread, one a process and for good, which else the first large message of a test would start."""

from __future__ import annotations

from zmq.utils import garbage

garbage.gc.start()
