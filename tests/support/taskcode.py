"""Modules for `run` that ask for their task: what is told of it, and what it draws."""

from __future__ import annotations

import os
import sys
import threading

from gates import announce, wait_at
from qjam import current_task


def told(task):
    return [task.slice, task.nslices, task.worker, task.host, task.attempt]


def tell(params, part):
    return {current_task().slice: told(current_task())}


def draw(seed, part):
    """So many numbers as the slice says, added up, in a sum that shows which came from where."""
    return {current_task().slice: float(current_task().rng(seed).random(part[0]).sum())}


def draw_and_die_once(seed_and_flag, part):
    """Like draw, but the first worker that comes to slice 1 dies."""
    seed, flag = seed_and_flag
    if current_task().slice == 1 and not os.path.exists(flag):
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        os._exit(1)
    return {**draw(seed, part), "attempts": {current_task().slice: current_task().attempt}}


def tell_in_a_thread(params, part):
    found = []
    thread = threading.Thread(target=lambda: found.append(told(current_task())))
    thread.start()
    thread.join()
    return {current_task().slice: found[0]}


def be_late_once(gate_and_way, part):
    """The first attempt at slice 0 says so, lets the second one on, and stays. The second may come before it."""
    gate, way = gate_and_way
    task = current_task()
    if task.slice == 0 and task.attempt == 1:
        announce(gate, task.attempt)
        announce(way)
        threading.Event().wait()
    elif task.slice == 0:
        wait_at(way)
    return {task.slice: told(task)}


def what_qjam_is(params, part):
    """Whether asking for the task has loaded qjam, and whether its names are one and the same however asked for."""
    import qjam

    before = "qjam.master" in sys.modules
    import qjam.errors
    from qjam import TaskError
    from qjam.hosts import HostSpec

    same = qjam.current_task is current_task and TaskError is qjam.errors.TaskError and HostSpec is qjam.HostSpec
    return {current_task().slice: [before, same, "qjam.master" in sys.modules]}


def outside_of_mapfunc(a, b):
    try:
        current_task()
    except RuntimeError as error:
        return {**a, **b, "reduce": str(error)}
    return {}


def merged(a, b):
    """For reduce: dicts, and the dicts in them."""
    return {**a, **b, **({"attempts": {**a["attempts"], **b["attempts"]}} if "attempts" in a else {})}
