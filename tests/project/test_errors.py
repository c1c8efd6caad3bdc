"""What a caller can rely on in qjam's exceptions: family, attributes, text, and that they travel."""

from __future__ import annotations

import copy
import pickle

import pytest

from qjam import errors

EVERY = [
    errors.QjamError("a"),
    errors.BootstrapError("node1: no python3"),
    errors.MasterClosed("closed"),
    errors.RoundTimeout("no result within 1.5 s"),
    errors.TaskError("node1", 3, 7, "Traceback ...\nZeroDivisionError: x", "ZeroDivisionError: x"),
    errors.TaskError("node1", 3, None, ""),
    errors.WorkerLost("node1", 3, 7, "killed by signal 11 (SIGSEGV)"),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_every_error_is_a_qjam_error(error: errors.QjamError) -> None:
    assert isinstance(error, errors.QjamError)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_every_error_keeps_its_type_text_and_attributes_in_a_pickle_and_a_copy(error, travel) -> None:
    back = travel(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_round_timeout_is_pythons_timeout_error_too() -> None:
    with pytest.raises(TimeoutError, match=r"1\.5 s"):
        raise errors.RoundTimeout("no result within 1.5 s")


def test_a_task_error_tells_where_it_was() -> None:
    error = errors.TaskError("node1", 3, 7, "trace")
    assert (error.host, error.worker, error.slice, error.remote_traceback) == ("node1", 3, 7, "trace")


def test_a_task_error_reads_as_what_where_and_then_the_remote_traceback() -> None:
    trace = "Traceback (most recent call last):\n  File ...\nZeroDivisionError: division by zero\n"
    error = errors.TaskError("node1", 3, 7, trace, "ZeroDivisionError: division by zero")
    first, *rest = str(error).splitlines()
    assert first == "ZeroDivisionError: division by zero (in worker 3 on node1, slice 7)"
    assert "\n".join(rest).endswith(trace.rstrip())


def test_a_task_error_without_a_slice_or_a_traceback_does_not_speak_of_them() -> None:
    text = str(errors.TaskError("node1", 0, None, "", "ImportError: no scipy"))
    assert text == "ImportError: no scipy (in worker 0 on node1)"


def test_a_worker_lost_tells_which_worker_and_how_it_ended() -> None:
    error = errors.WorkerLost("node1", 3, 7, "killed by signal 11 (SIGSEGV)")
    assert (error.host, error.worker, error.slice, error.how) == (
        "node1",
        3,
        7,
        "killed by signal 11 (SIGSEGV)",
    )
    assert str(error) == "worker 3 on node1, slice 7: killed by signal 11 (SIGSEGV)"
