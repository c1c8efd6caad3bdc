"""Helpers of a script or notebook that functools has wrapped."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

from own_programs import hosts, script  # noqa: F401
from ssh_hosts import home, ssh_host  # noqa: F401

HELPERS = """
    import functools, numbers
    from qjam import Master

    calls = []

    @functools.lru_cache(maxsize=64)
    def square(x):
        calls.append(x)
        return x * x

    @functools.cache
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    @functools.singledispatch
    def size(value):
        return 1

    @size.register
    def _(value: list):
        return sum(map(size, value))

    @size.register(numbers.Real)
    def _(value):
        return 10

    def logged(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args) + 1000
        return wrapper

    @logged
    @functools.lru_cache
    def wrapped(x):
        return x

    add = functools.partial(lambda a, b: a + b, 5)
    cached_add = functools.lru_cache(None)(functools.partial(lambda a, b: a + b, 7))

    class Model:
        def __init__(self, x): self.x = x

        @functools.cached_property
        def heavy(self):
            calls.append(self.x)
            return self.x * 2

        @functools.lru_cache
        def method(self, y): return self.x + y

        @functools.singledispatchmethod
        def kind(self, value): return "other"

        @kind.register
        def _(self, value: int): return f"int of {self.x}"

        @kind.register
        @classmethod
        def _(cls, value: str): return f"str of {cls.__name__}"

        @staticmethod
        @functools.cache
        def static(x): return -x

        @classmethod
        @functools.cache
        def of(cls, x): return cls(x).x

        def both(self, a, b): return (self.x, a, b)
        half = functools.partialmethod(both, "a")

        @property
        @functools.cache
        def prop(self): return "prop"

    @functools.total_ordering
    class Ordered:
        def __init__(self, x): self.x = x
        def __eq__(self, other): return self.x == other.x
        def __lt__(self, other): return self.x < other.x
    """


@pytest.fixture
def helped(script):
    return lambda source: script(textwrap.dedent(HELPERS) + textwrap.dedent(source))


def test_they_are_used_by_a_function(helped):
    source = """
        def work(params, part):
            model = Model(3)
            assert square(4) == square(4) == 16 and square.cache_info().misses == 1
            assert square.cache_info().maxsize == 64 and square.cache_parameters()["typed"] is False
            assert square.__name__ == "square" and square.__wrapped__(2) == 4
            assert fib(30) == 832040
            assert (size("a"), size([1, "b", [2.5]]), size(None)) == (1, 21, 1)
            assert wrapped(1) == 1001 and add(2) == 7 and cached_add(1) == 8
            calls.clear()
            assert model.heavy == model.heavy == 6 and calls == [3]
            assert model.method(1) == 4 and Model.static(2) == -2 and Model.of(9) == 9
            assert (model.kind(1), model.kind("s"), model.kind(None)) == ("int of 3", "str of Model", "other")
            assert model.half("b") == (3, "a", "b") and model.prop == "prop"
            assert Ordered(1) < Ordered(2) and Ordered(2) >= Ordered(1)
            return {"model": model, "params": params}

        with Master(HOSTS) as master:
            for _ in range(2):
                result = master.run(work, Model(4), [0])
                print(type(result["model"]) is Model, result["model"].heavy, calls, result["params"].method(3))
        print(square(2), calls, fib(20), size([1, 2]))
        """
    assert helped(source) == ["True 6 [] 7"] * 2 + ["4 [2] 6765 20"]


def test_they_are_what_is_run_and_what_is_sent(helped):
    source = """
        @functools.lru_cache
        def cached(params, part=None): return params + 1

        @functools.singledispatch
        def dispatched(params, part): return "other"

        @dispatched.register
        def _(params: int, part): return "int"

        def send(params, part): return [function(3) for function in params]

        with Master(HOSTS) as master:
            print(master.run(cached, 1), master.run(dispatched, 1, [0]), master.run(dispatched, "", [0]))
            print(master.run(functools.partial(cached), 5))
            print(master.run(logged(lambda params, part: 1), None, [0]))
            print(master.run(lambda params, part: Model(3).half(params), 1, [0]))
            print(master.run(send, [square, fib, size, wrapped, add, cached_add, Model(1).method, Model.static], [0]))
        """
    assert helped(source) == ["4 int other", "12", "1001", "(3, 'a', 1)", "[9, 2, 10, 1003, 8, 10, 4, -3]"]


def test_those_of_a_module_are_the_modules_own(helped, tmp_path):
    (tmp_path / "helping.py").write_text(textwrap.dedent(HELPERS).replace("from qjam import Master", ""))
    source = """
        import helping

        def work(params, part):
            import helping as there
            assert helping.square is there.square and helping.size is there.size
            helping.square(3)
            return helping.square.cache_info().currsize

        with Master(HOSTS.replace("2", "1")) as master:
            print(master.run(work), master.run(work))
        """
    assert helped(source) == ["1 1"]


def test_what_is_cached_in_a_worker_lasts(helped):
    source = """
        def work(params, part):
            square(params)
            return square.cache_info().currsize

        with Master(HOSTS.replace("2", "1")) as master:
            print([master.run(work, i % 4) for i in range(8)])
        """
    assert helped(source) == ["[1, 2, 3, 4, 4, 4, 4, 4]"]


def test_they_work_in_the_cells_of_a_notebook(tmp_path):
    cells = [
        *re.split(r"\n\n(?=\S)", textwrap.dedent(HELPERS)),
        "master = Master(2)",
        "@functools.lru_cache\ndef work(params, part): return square(params) + fib(10) + size([1]) + Model(1).heavy",
        "print(master.run(work, 2))",
        "@functools.cache\ndef fib(n): return 0",
        "print(master.run(work, 2))",
        "master.close()",
    ]
    program = "\n".join(
        [
            "from IPython.core.interactiveshell import InteractiveShell",
            "shell = InteractiveShell.instance()",
            *(f"shell.run_cell({cell!r}, store_history=True).raise_error()" for cell in cells),
        ]
    )
    (tmp_path / "notebook.py").write_text(program)
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(2 * (4 + 55 + 10 + 2)), str(2 * (4 + 0 + 10 + 2))]
