"""What users do that nobody thinks of first: each of these has once hung a round or ended the pool."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
from processes import all_end, descendants, output
from qjam import BaseDataSet, DataSet, Master, MasterClosed, TaskError

Pair = namedtuple("Pair", "count total")


@pytest.fixture(scope="module")
def two():
    with Master(2) as master:
        yield master


def is_usable(master):
    return master.run(lambda params, part: 42) == 42 * len(master.workers)


@pytest.mark.parametrize("timeout", [float("inf"), 3e6, 10**400])
def test_a_timeout_may_be_as_long_as_one_likes(two, timeout):
    assert two.run(lambda params, part: 1, timeout=timeout) == 2


def test_a_timeout_that_is_no_number_is_refused(two):
    with pytest.raises(ValueError, match="timeout must be a positive number"):
        two.run(lambda params, part: 1, timeout=float("nan"))


def test_slices_may_be_more_than_file_descriptors(tmp_path):
    script = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    from qjam import DataSet, Master
    with Master(2) as master:
        data = DataSet(list(range(1000)), slice_size=1)
        for _ in range(2):
            print(master.run(lambda params, part: part[0], None, data))
    """
    assert output(tmp_path, script).split() == ["499500", "499500"]


@pytest.mark.parametrize("values", [(10**400, 1.5), (np.int64(1), 10**30)])
def test_results_that_cannot_be_added_are_an_error_of_the_task_and_not_the_end_of_the_pool(two, values):
    with pytest.raises(TaskError, match="Error"):
        two.run(lambda params, part: values[part[0]], None, DataSet([0, 1], slice_size=1))
    assert is_usable(two)


def test_a_sum_that_overflows_does_not_warn_in_the_users_process(two):
    assert two.run(lambda params, part: np.int8(100), None, DataSet([0, 1], slice_size=1)) == np.int8(-56)


def test_params_and_results_may_hold_more_arrays_than_a_message_has_frames(two):
    arrays = [np.zeros(200) for _ in range(66_000)]
    assert two.run(lambda params, part: len(params), arrays, [1]) == 66_000
    assert len(two.run(lambda params, part: [np.zeros(200)] * 66_000, None, [1])) == 66_000


def test_a_very_long_exception_arrives_cut(two):
    def complain(params, part):
        raise ValueError("x" * 40_000_000)

    with pytest.raises(TaskError) as caught:
        two.run(complain, None, [1])
    assert len(str(caught.value)) < 1_000_000
    assert is_usable(two)


def test_an_exception_may_name_a_file_that_is_no_text(two):
    def complain(params, part):
        raise FileNotFoundError("bad\udcff.txt")

    with pytest.raises(TaskError) as caught:
        two.run(complain, None, [1])
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_fork_of_the_program_neither_uses_the_pool_nor_keeps_it_from_closing():
    before = descendants(os.getpid())
    master = Master(2)
    workers = descendants(os.getpid()) - before
    told, tell = os.pipe()
    go, let_go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            master.run(lambda params, part: 1)
        except MasterClosed:
            os.write(tell, b"closed")
        os.read(go, 1)
        os._exit(0)
    assert os.read(told, 100) == b"closed"
    master.close()
    assert all_end(workers)
    os.write(let_go, b"!")
    os.waitpid(child, 0)
    for fd in (told, tell, go, let_go):
        os.close(fd)


def test_a_thread_of_user_code_that_imports_after_its_task_disturbs_no_later_round(two):
    def leave_a_thread(params, part):
        def import_much():
            for number in range(50):
                with contextlib.suppress(ImportError):
                    __import__(f"no_such_module_{number}")

        threading.Thread(target=import_much).start()
        return 1

    two.run(leave_a_thread)
    for _ in range(50):
        assert is_usable(two)


class Leaving(BaseDataSet):
    def chunks(self):
        return 2

    def slice(self, index):
        if threading.current_thread().name == "qjam-load":
            raise SystemExit(3)
        return ["of this data set alone", index]


def test_a_data_set_that_exits_ends_its_round_and_no_other(two):
    with pytest.raises(SystemExit):
        two.run(lambda params, part: 1, None, Leaving())
    assert two.run(lambda params, part: part[0], None, DataSet([20, 22], slice_size=1)) == 42


def shown_at(target):
    with Master(1) as master, contextlib.redirect_stdout(target):
        return master.run(lambda params, part: print("grüß") or 1)


def test_a_stdout_that_takes_no_text_holds_nothing_up():
    assert shown_at(io.BytesIO()) == 1


def test_what_the_coding_of_stdout_lacks_is_shown_escaped():
    target = io.TextIOWrapper(io.BytesIO(), "ascii")
    shown_at(target)
    assert target.buffer.getvalue() == b"[local 0] gr\\xfc\\xdf\n"


@pytest.mark.parametrize("kind", [list, tuple, Pair])
def test_a_mapfunc_may_give_one_and_the_same_buffer_again_and_again(two, kind):
    buffer = np.zeros(2)

    def reuse(params, part):
        buffer[:] = part[0]
        return Pair(1, buffer) if kind is Pair else kind([1, buffer])

    count, total = two.run(reuse, None, DataSet(list(range(64)), slice_size=1))
    assert (count, total.tolist()) == (64, [2016.0, 2016.0])


def test_what_user_code_does_to_the_shape_of_a_slice_is_gone_in_the_next_round(two):
    def reshape(params, part):
        before = part.shape
        part.shape = (part.size,)
        return [list(before)]

    data = DataSet(np.zeros((4, 3)))
    assert [two.run(reshape, None, DataSet(data, slice_size=None))[0][1] for _ in range(2)] == [6, 6]


def test_results_that_overflow_their_slot_leave_no_files(two):
    def folders():
        maps = Path(f"/proc/{two.workers[0].pid}/maps").read_text()
        return {line.split()[-1].rpartition("/")[0] for line in maps.splitlines() if "/qjam-" in line}

    data = DataSet(list(range(8)), slice_size=1)
    before = {name for folder in folders() for name in os.listdir(folder)}
    for _ in range(10):
        two.run(lambda params, part: np.ones(20_000), None, data)
    after = {name for folder in folders() for name in os.listdir(folder)}
    assert not [name for name in after - before if name.startswith(("result", "fold"))]


def test_a_callback_of_a_future_may_wait_for_another(two):
    got, done = [], threading.Event()

    def again(future):
        got.append(two.submit(lambda params, part: 2).result())
        done.set()

    two.submit(lambda params, part: 1).add_done_callback(again)
    done.wait()
    assert got == [4]


def test_a_master_that_nobody_holds_is_closed():
    before = descendants(os.getpid())
    master = Master(1)
    master.submit(lambda params, part: 1).result()
    started = descendants(os.getpid()) - before
    del master
    gc.collect()
    assert all_end(started)


def test_a_master_cannot_be_captured_by_a_function(two):
    with pytest.raises(TypeError, match="a Master cannot be pickled or sent to workers"):
        two.run(lambda params, part: len(two.workers))


def test_what_cannot_be_sent_is_named(two):
    with pytest.raises(TypeError, match="dataset: a slice cannot be sent"):
        two.run(lambda params, part: 1, None, [threading.Lock()])
    with pytest.raises(TypeError, match="params cannot be sent"):
        two.run(lambda params, part: 1, threading.Lock())
    with pytest.raises(TaskError, match="mapfunc or reduce gave a result that cannot be sent back"):
        two.run(lambda params, part: threading.Lock(), None, [1])
