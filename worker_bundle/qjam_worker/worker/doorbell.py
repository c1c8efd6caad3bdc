"""What calls a worker, and with what it calls its node."""

from __future__ import annotations

import os
import select

from .streams import out_of_the_way


class Doorbell:
    """A bell of its own, the broadcast that calls all workers, and the pipe that its node watches."""

    def __init__(self, bell: int, broadcast: int, answered: int) -> None:
        self._answered = answered
        made = select.epoll()
        self._poll = select.epoll.fromfd(out_of_the_way(os.dup(made.fileno())))
        made.close()
        self._poll.register(bell, select.EPOLLIN)
        self._poll.register(
            broadcast, select.EPOLLIN | select.EPOLLET
        )  # each beat of it, without taking it from the others
        self._beat = [(broadcast, select.EPOLLIN)]

    def wait(self) -> bool:
        """Block until one of them rings; whether there are messages."""
        return self._poll.poll() != self._beat

    def answer(self) -> None:
        """Call the node: an answer is in the page.

        By a pipe, because the kernel takes it that who writes to one is about to sleep, and rather lets the node have
        this core than another one on which a worker is busy. Of 10 rounds of two workers on two cores the node went to
        the other one in 4 by an eventfd, and in 2 so.
        """
        os.write(self._answered, b"!")
