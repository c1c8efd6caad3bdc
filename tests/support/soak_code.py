"""What tests/system/soak.py runs on the hosts."""

import time

import numpy as np


def mapfunc(params, part):
    factor, pause = params
    time.sleep(pause)
    return np.cumsum(part[0] * (1.0 + factor / 7.0))
