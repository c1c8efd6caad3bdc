"""What a user's module may do, good and bad: the functions that tests hand to `run` by name."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import weakref

import numpy as np

from gates import announce, wait_at


def add_up(factor, part):
    return factor * sum(part)


def total(params, part):
    return float(np.sum(part))


def sums(params, part):
    """What depends on the order of adding, and on how the numbers lie in memory."""
    return (part @ params).sum(), part.sum(0), float(part[:, 0].sum())


def seventh(params, part):
    return params * float(part[0]) / 7.0


def times_and_count(params, part):
    return [params * part[0], part[0]]


def forty_two(params, part):
    return 42


def give_params(params, part):
    return params


def give_a_lambda(params, part):
    return lambda: 1


def give_what_cannot_be_added(params, part):
    return object()


# Ends of a round


def raise_no(params, part):
    raise ValueError("no")


def divide(params, part):
    return 1 / params


class Fussy(Exception):
    """Cannot be built again from what pickle keeps of it."""

    def __init__(self, first, second):
        super().__init__("fussy")
        self.second = second


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raise_fussy(params, part):
    raise Fussy(1, 2)


def raise_mute(params, part):
    raise Mute


def raise_with_a_lambda(params, part):
    raise ValueError("holds a lambda", lambda: 1)


def raise_one_of_its_own(params, part):
    raise type("MadeThere", (Exception,), {})("made in the worker")


def recurse(params, part):
    return recurse(params, part)


# Ends of a worker


def sys_exit(params, part):
    sys.exit(params)


def os_exit(params, part):
    os._exit(9)


def segfault(params, part):
    ctypes.string_at(0)


def kill_itself(params, part):
    os.kill(os.getpid(), signal.SIGKILL)


def abort(params, part):
    os.abort()


def die_the_first_time(flag, part):
    """Gives the sum of the slice, but ends its process at slice [3] unless that has happened before."""
    if 3 in part:
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os._exit(1)
    return sum(part)


def die_at_three(tally, part):
    if 3 in part:
        with open(tally, "a") as file:
            file.write("x")
        os._exit(1)
    return sum(part)


# No end


def sum_after_the_gate(gate, part):
    wait_at(gate)
    return sum(part)


def linger(gate, part):
    """Says that it is there and stays."""
    announce(gate, os.getpid())
    while True:
        signal.pause()


def linger_and_tidy_up(gates, part):
    try:  # before it is told: the interrupt may follow at once
        announce(gates[0], os.getpid())
        while True:
            signal.pause()
    finally:
        announce(gates[1], "tidied up")


def deaf(gate, part):
    """Like linger, but cannot be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    announce(gate, os.getpid())
    while True:
        signal.pause()


def swallow(gate, part):
    """Like linger, but swallows whatever is raised in it."""
    told = False
    while True:
        try:
            if not told:
                told = True
                announce(gate, os.getpid())
            while True:
                signal.pause()
        except BaseException:
            pass


def linger_forever(params, part):
    """No end, and nobody is told."""
    while True:
        signal.pause()


def linger_once(gate_and_flag, part):
    """Gives the sum of the slice; whoever is first says so and stays."""
    gate, flag = gate_and_flag
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return sum(part)
    announce(gate, os.getpid())
    while True:
        signal.pause()


# Values whose order of adding shows


def scaled(factor, part):
    return part[0] * factor


# What stays


class Weak:
    """A value that can be watched."""

    def __init__(self, name):
        self.name = name


_watched = []


def watch_params_and_raise(params, part):
    """Raises, with params on its stack; called with None it says how many of what it has seen are gone, and forgets."""
    gc.disable()
    if params is not None:
        value = next(iter(params.values())) if isinstance(params, dict) else params
        _watched.append(weakref.ref(value))
        raise ValueError("with params on the stack")
    gone = sum(ref() is None for ref in _watched)
    _watched.clear()
    return gone


def die_always(params, part):
    os._exit(1)
