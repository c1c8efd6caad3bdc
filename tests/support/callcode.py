"""Functions that calls call: found by name in the workers."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

SCALE = 1
LOADED = os.getpid()


def add(a, b=0):
    return a + b


def scaled(x):
    return x * SCALE


def pid():
    return os.getpid()


def nap(seconds):
    time.sleep(seconds)
    return seconds


def touch_and_nap(path, seconds):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return seconds


def fail(text):
    raise KeyError(text)


def die(status=3):
    os._exit(status)


def die_the_first_times(path, times):
    """Kills its process so many times; each leaves a line in the file."""
    with open(path, "a+") as file:
        file.seek(0)
        begun = len(file.readlines())
        file.write("begun\n")
    if begun < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return begun


def total(array):
    return float(array.sum()), array.flags.writeable


def ones(n):
    return np.ones(n)


def mapped(factor, part):
    time.sleep(0.01)
    return factor * float(np.sum(part))


_prepared = []


def prepare(value):
    _prepared.append(value)


def prepared():
    return os.getpid(), list(_prepared)
