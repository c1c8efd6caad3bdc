"""Executor, as far as it is no ProcessPoolExecutor: a Master's workers, hosts, limits, forks, Ctrl-C, asyncio, tqdm."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import os
import pickle
import signal
import threading
from concurrent.futures import Future

import pytest
from tqdm import tqdm

import jobcode
from gates import Gate
from own_programs import hosts, script  # noqa: F401
from processes import finish, start
from qjam import Executor, Master
from ssh_hosts import home, ssh_host  # noqa: F401


@pytest.fixture(scope="module")
def executor():
    with Executor(2) as executor:
        concurrent.futures.wait([executor.submit(jobcode.square, 1)])  # its threads are there from now on
        yield executor


@pytest.fixture
def gates(tmp_path):
    made = [Gate(tmp_path / name) for name in ("told", "gate")]
    yield made
    for gate in made:
        gate.open(100)
        gate.close()


# Arguments


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "max_workers must be an integer or None, not 'two'", {"max_workers": "two"}),
        (TypeError, "max_pending must be an integer or None, not True", {"max_pending": True}),
        (ValueError, "max_pending must be greater than 0, not 0", {"max_pending": 0}),
        (ValueError, r"'node1\*8' for 8 workers on node1", {"hosts": "node1", "max_workers": 2}),
        (TypeError, "master must be a Master, not 5", {"master": 5}),
        (TypeError, "initargs must be a tuple", {"initializer": int, "initargs": 5}),
        (TypeError, "unexpected keyword argument 'mp_context'", {"mp_context": None}),
        (TypeError, "unexpected keyword argument 'max_tasks_per_child'", {"max_tasks_per_child": 3}),
        (ValueError, r"hosts: 'node2\$' is not a host", {"hosts": "node1 node2$"}),
    ],
)
def test_a_wrong_argument_is_named(error, text, arguments):
    with pytest.raises(error, match=text):
        Executor(**arguments)


def test_a_wrong_argument_of_a_call_is_named(executor):
    with pytest.raises(TypeError, match="fn must be callable, not 5"):
        executor.submit(5, abs)
    with pytest.raises(TypeError, match="fn must be callable, not \\[1, 2\\]"):
        executor.map([1, 2], abs)
    with pytest.raises(TypeError, match=r"iterables: 5 .* is not iterable"):
        executor.map(abs, 5)
    with pytest.raises(TypeError, match="timeout must be a number of seconds or None"):
        executor.map(abs, [1], timeout="1")
    with pytest.raises(TypeError, match="chunksize must be an integer"):
        executor.map(abs, [1], chunksize=1.5)


def test_functions_of_all_kinds(executor):
    offset = 3
    assert executor.submit(lambda x: x + offset, 1).result() == 4
    assert executor.submit("a-b".split, "-").result() == ["a", "b"]
    assert executor.submit(jobcode.Thing().method).result() == "done"
    assert list(executor.map(str.upper, "abc")) == ["A", "B", "C"]


def test_it_tells_what_it_is():
    with Executor(1) as executor:
        assert repr(executor) == "<Executor: open, on <Master: 1 worker on local>>"
        assert executor._max_workers == 1
    assert repr(executor).startswith("<Executor: shut down, on <Master: closed")


def test_it_is_not_pickled(executor):
    with pytest.raises(TypeError, match="an Executor cannot be pickled"):
        pickle.dumps(executor)
    with pytest.raises(Exception, match="an Executor cannot be pickled"):
        executor.submit(id, executor).result()


# A Master's workers


def test_a_master_lends_its_workers():
    with Master(2) as master:
        executor = Executor(master=master)
        pids = {worker.pid for worker in master.workers}
        assert executor.submit(os.getpid).result() in pids
        executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(os.getpid)
        assert master.run(lambda params, part: 1) == 2
        with pytest.raises(ValueError, match="leave out hosts"):
            Executor(2, master=master)
        with pytest.raises(ValueError, match="options of Master"):
            Executor(master=master, echo=False)


def test_the_end_of_the_master_ends_its_calls(gates):
    told, gate = gates
    with Master(1) as master:
        executor = Executor(master=master)
        futures = [executor.submit(jobcode.tell_and_wait, told.path, gate.path) for _ in range(3)]
        told.heard()
    for future in futures:
        assert "closed" in str(future.exception(30))
    executor.shutdown()


def test_two_executors_of_one_master_end_apart(gates):
    told, gate = gates
    with Master(2) as master, Executor(master=master) as one:
        two = Executor(master=master)
        future = one.submit(jobcode.tell_and_wait, told.path, gate.path, 5)
        told.heard()
        two.submit(jobcode.square, 3)
        two.terminate_workers()
        gate.open()
        assert future.result(30) == 5


# max_pending


def test_submit_waits_where_there_are_many(gates):
    told, gate = gates
    with Executor(1, max_pending=2) as executor:
        futures = [executor.submit(jobcode.tell_and_wait, told.path, gate.path, i) for i in range(2)]
        third: Future[object] = Future()
        thread = threading.Thread(target=lambda: third.set_result(executor.submit(jobcode.square, 3)))
        thread.start()
        told.heard()
        assert not third.done()
        gate.open(2)
        assert third.result(30).result(30) == 9
        thread.join()
        assert [future.result(30) for future in futures] == [0, 1]
        assert list(executor.map(jobcode.square, range(50))) == [i * i for i in range(50)]


def test_submit_that_waits_ends_with_shutdown(gates):
    told, gate = gates
    executor = Executor(1, max_pending=1)
    executor.submit(jobcode.tell_and_wait, told.path, gate.path)
    told.heard()
    waiting = threading.Event()
    caught: Future[BaseException] = Future()

    def submit():
        waiting.set()
        try:
            executor.submit(jobcode.square, 3)
        except RuntimeError as error:
            caught.set_result(error)

    thread = threading.Thread(target=submit)
    thread.start()
    waiting.wait()
    executor.shutdown(wait=False)
    assert "after shutdown" in str(caught.result(30))
    thread.join()
    gate.open()
    executor.shutdown()


# map


def test_an_iterator_that_is_closed_cancels_the_rest(executor, gates):
    _, gate = gates
    results = executor.map(jobcode.maybe_wait, [None, *[gate.path] * 5])
    assert next(results) is None
    results.close()
    assert executor.submit(jobcode.square, 3).result(30) == 9  # with the gate shut


def test_items_that_raise_cancel_what_was_submitted(executor, gates):
    told, gate = gates

    def items():
        yield told.path
        yield told.path
        raise OSError("no more items")

    with pytest.raises(OSError, match="no more items"):
        executor.map(jobcode.tell_and_wait, items(), [gate.path] * 6)
    assert executor.submit(jobcode.square, 3).result(30) == 9


# Ctrl-C, forks


def test_ctrl_c_in_the_block_drops_the_calls(tmp_path):
    program = start(
        tmp_path,
        """
        import time
        from qjam import Executor

        def work(path):
            open(path, "w").close()
            time.sleep(60)

        if __name__ == "__main__":
            try:
                with Executor(1) as executor:
                    futures = [executor.submit(work, "begun") for _ in range(5)]
                    while not futures[0].running():
                        time.sleep(0.01)
                    print("runs", flush=True)
                    futures[0].result()
            except KeyboardInterrupt:
                print(all(future.cancelled() for future in futures))
        """,
    )
    assert program.stdout.readline() == "runs\n"
    program.send_signal(signal.SIGINT)
    assert finish(program) == "True\n"


@pytest.mark.parametrize("where", ["in a call", "at the end"])
def test_ctrl_c_ends_the_program(tmp_path, where):
    program = start(
        tmp_path,
        f"""
        import threading, time
        from qjam import Executor

        if __name__ == "__main__":
            executor = Executor(1)
            futures = [executor.submit(time.sleep, 60) for _ in range(5)]
            while not futures[0].running():
                time.sleep(0.01)
            def tell():
                while not executor._calls._waiting:
                    time.sleep(0.01)
                print("runs", flush=True)

            if {where == "at the end"}:
                threading.Thread(target=tell, daemon=True).start()
            else:
                print("runs", flush=True)
                futures[0].result()
        """,
    )
    assert program.stdout.readline() == "runs\n"
    program.send_signal(signal.SIGINT)
    try:
        _, errors = program.communicate(timeout=30)
    finally:
        program.kill()
    assert ("Traceback" in errors) == (where == "in a call"), errors


@pytest.mark.filterwarnings("ignore:.*multi-threaded")  # of python 3.12 and newer
def test_a_fork_of_the_program_has_no_executor(executor):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "no error"
        try:
            executor.submit(jobcode.square, 1)
        except RuntimeError as error:
            text = str(error)
        try:
            executor.shutdown()
            os.write(writer, text.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert f"this Executor belongs to process {os.getpid()}, and this is a fork of it" in os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert executor.submit(jobcode.square, 3).result() == 9


def test_a_fork_of_the_program_ends_at_once(tmp_path):
    program = start(
        tmp_path,
        """
        import os, sys, time
        from qjam import Executor

        if __name__ == "__main__":
            executor = Executor(1)
            future = executor.submit(time.sleep, 0.3)
            if os.fork() == 0:
                sys.exit(7)
            print(os.waitstatus_to_exitcode(os.wait()[1]), future.result())
        """,
    )
    assert finish(program) == "7 None\n"


# asyncio, tqdm


def test_asyncio(executor):
    async def main():
        loop = asyncio.get_running_loop()
        results = [
            await loop.run_in_executor(executor, jobcode.square, 3),
            await asyncio.wrap_future(executor.submit(jobcode.square, 4)),
            *await asyncio.gather(*(loop.run_in_executor(executor, jobcode.square, i) for i in range(20))),
        ]
        with pytest.raises(RuntimeError, match="123"):
            await loop.run_in_executor(executor, jobcode.fail)
        return results

    assert asyncio.run(main()) == [9, 16, *(i * i for i in range(20))]


def test_a_task_of_asyncio_that_is_cancelled_interrupts_its_call(executor, gates):
    told, gate = gates

    async def main():
        future = executor.submit(jobcode.tell_and_wait, told.path, gate.path)
        told.heard()
        task = asyncio.ensure_future(asyncio.wrap_future(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return future

    assert asyncio.run(main()).cancelled()


def test_a_default_executor_of_asyncio(executor):
    async def main():
        return await asyncio.get_running_loop().run_in_executor(executor, jobcode.square, 5)

    assert asyncio.run(main()) == 25


def test_tqdm(executor, monkeypatch):
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # else a thread of its own stays
    shown = io.StringIO()
    futures = [executor.submit(jobcode.square, i) for i in range(10)]
    done = [future.result() for future in tqdm(concurrent.futures.as_completed(futures), total=10, file=shown)]
    assert sorted(done) == [i * i for i in range(10)]
    assert "10/10" in shown.getvalue()
    results = tqdm(executor.map(jobcode.square, range(10)), total=10, file=shown)
    assert list(results) == [i * i for i in range(10)]
    assert shown.getvalue().count("100%") == 2


# Hosts


def test_programs_on_this_machine_and_on_ssh_hosts(script):
    source = """
        import concurrent.futures, os, sys
        from qjam import Executor

        offset = 10
        def shifted(x): return x + offset
        def failing(): raise ValueError("there")
        class Point:
            def __init__(self, x): self.x = x
        def start(value):
            global offset
            offset = value

        if __name__ == "__main__":
            with Executor(HOSTS) as executor:
                print(executor._max_workers, executor.submit(pow, 2, 8).result())
                print(list(executor.map(shifted, range(5))), list(executor.map(shifted, range(5), chunksize=2)))
                print(type(executor.submit(Point, 3).result()) is Point)
                error = executor.submit(failing).exception()
                print(repr(error), 'raise ValueError("there")' in str(error.__cause__))
            with Executor(HOSTS, initializer=start, initargs=(100,)) as executor:
                print(list(executor.map(shifted, range(3))))
        """
    assert script(source) == [
        "2 256",
        "[10, 11, 12, 13, 14] [10, 11, 12, 13, 14]",
        "True",
        "ValueError('there') True",
        "[100, 101, 102]",
    ]
