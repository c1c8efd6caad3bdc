"""A module for `run`: the list, in order, of what the function in `params` gives for each slice."""

from __future__ import annotations


def mapfunc(function, part):
    return [function(part)]


def reduce(a, b):
    return a + b
