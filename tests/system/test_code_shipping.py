"""The user's code comes to the workers: modules, functions, scripts, notebooks, and whatever these import."""

from __future__ import annotations

import functools
import importlib
import operator
import sys

import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from processes import output
from projects import Project, project  # noqa: F401
from qjam import Master, QjamError, TaskError


@pytest.fixture(scope="module")
def master():
    with Master(2) as master:
        yield master


# Modules and functions of the project


def test_a_module_is_shipped(master, project):
    module = project.module("plain", "def mapfunc(params, part): return params + len(part)")
    assert master.run(module, 1, [5, 6]) == 4


def test_a_function_of_a_module_is_shipped_with_all_that_it_uses_there(master, project):
    source = """
        BASE = 10
        def helper(x): return BASE + x
        class Box:
            @staticmethod
            def inside(params, part): return helper(params)
        def outside(params, part): return helper(params)
        """
    module = project.module("with_helpers", source)
    assert master.run(module.outside, 1) == 22
    assert master.run(module.Box.inside, 2) == 24


def test_the_module_is_loaded_once_in_each_worker(master, project):
    module = project.module("counting", "count = [0]\ndef mapfunc(p, s): count[0] += 1; return count[0]")
    assert master.run(module) == 2
    assert master.run(module) == 4


def test_project_modules_that_the_module_imports_are_fetched(master, project):
    project.write("first_part.py", "import second_part\nvalue = second_part.value * 2")
    project.write("second_part.py", "value = 21")
    module = project.module("importing", "import first_part\ndef mapfunc(p, s): return first_part.value")
    assert master.run(module) == 84


def test_an_import_inside_a_function_is_fetched_when_it_runs(master, project):
    project.write("late.py", "value = 5")
    module = project.module("lazy", "def mapfunc(p, s):\n    import late\n    return late.value")
    assert "late" not in sys.modules
    assert master.run(module) == 10


def test_what_is_not_imported_is_not_fetched(master, project):
    project.write("broken.py", "1 / 0")
    module = project.module("cautious", "def mapfunc(p, s):\n    if p: import broken\n    return 1")
    assert master.run(module, False) == 2


PACKAGE = {
    "pack/__init__.py": "from . import constants\nscale = constants.SCALE",
    "pack/constants.py": "SCALE = 3",
    "pack/work.py": """
        from . import scale
        from .constants import SCALE
        from .deep.inner import depth
        import pack.deep.inner as inner
        def mapfunc(params, part):
            from .late import value
            from .deep import later
            return [scale, SCALE, depth, inner.depth, value, later.value]
        """,
    "pack/late.py": "from pack import scale\nvalue = scale + 1",
    "pack/deep/__init__.py": "",
    "pack/deep/inner.py": "from ..constants import SCALE\ndepth = SCALE * 10",
    "pack/deep/later.py": "from .. import late\nvalue = late.value + 1",
}


def test_relative_and_lazy_imports_inside_packages_are_fetched(master, project):
    for name, source in PACKAGE.items():
        project.write(name, source)
    module = importlib.import_module("pack.work")
    assert master.run(module, None, [0]) == [3, 3, 30, 30, 4, 5]


def test_a_package_may_be_run_itself(master, project):
    project.write("whole/__init__.py", "from .part import mapfunc")
    project.write("whole/part.py", "def mapfunc(params, part): return 3")
    assert master.run(importlib.import_module("whole")) == 6


def test_a_package_without_init_is_one_too(master, project):
    project.write("bare/one.py", "from .two import value\ndef mapfunc(p, s): return value")
    project.write("bare/two.py", "value = 4")
    assert master.run(importlib.import_module("bare.one")) == 8


def test_modules_that_import_each_other_are_fetched(master, project):
    project.write("ring_a.py", "import ring_b\ndef f(): return ring_b.value")
    project.write("ring_b.py", "import ring_a\nvalue = 6\ndef mapfunc(p, s): return ring_a.f()")
    assert master.run(importlib.import_module("ring_b")) == 12


def test_a_thread_of_user_code_may_import(master, project):
    project.write("from_thread.py", "value = 7")
    source = """
        import threading
        def mapfunc(p, s):
            found = []
            def look():
                import from_thread
                found.append(from_thread.value)
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return found[0]
        """
    assert master.run(project.module("threading_user", source)) == 14


def test_user_code_may_import_qjam(master, project):
    module = project.module("user_of_qjam", "import qjam\ndef mapfunc(p, s): return len(qjam.DataSet([1]))")
    assert master.run(module) == 2


def test_source_may_be_in_any_encoding_that_it_declares(master, project):
    source = "# coding: latin-1\nword = 'caf\xe9'\ndef mapfunc(p, s): return len(word)\n"
    (project.folder / "accents.py").write_bytes(source.encode("latin-1"))
    importlib.invalidate_caches()
    assert master.run(importlib.import_module("accents")) == 8


def test_the_remote_traceback_quotes_the_users_source(master, project):
    module = project.module("tracing", "def mapfunc(p, s):\n    return 1 / p  # the very line\n")
    with pytest.raises(TaskError) as caught:
        master.run(module, 0)
    assert "the very line" in caught.value.remote_traceback
    assert str(project.folder / "tracing.py") in caught.value.remote_traceback


# Names of the standard library


@pytest.fixture
def name(request, monkeypatch):
    """A name of the standard library's, free for the user; the library's own comes back afterwards."""
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


@pytest.mark.parametrize("name", ["test", "statistics", "calendar"], indirect=True)
def test_a_module_named_like_one_of_the_standard_library_is_the_users(project, name):
    module = project.module(name, "def mapfunc(params, part): return 21")
    with Master(2) as master:
        assert master.run(module) == 42
        assert master.run(module.mapfunc) == 42


@pytest.mark.parametrize("name", ["test", "statistics", "calendar"], indirect=True)
def test_an_imported_module_named_like_one_of_the_standard_library_is_the_users(project, name):
    project.write(f"{name}.py", "value = 21")
    module = project.module(f"uses_{name}", f"import {name}\ndef mapfunc(p, s): return {name}.value")
    with Master(2) as master:
        assert master.run(module) == 42


def test_the_standard_librarys_own_modules_stay_what_they_are(master):
    assert master.run(lambda params, part: __import__("statistics").mean([41, 43])) == 84


# Edits


def test_an_edited_module_is_shipped_anew(master, project):
    module = project.module("edited", "def mapfunc(params, part): return 1")
    assert master.run(module) == 2
    project.write("edited.py", "def mapfunc(params, part): return 100")
    importlib.reload(module)
    assert master.run(module) == 200
    assert master.run(module.mapfunc) == 200


def test_a_reloaded_module_that_another_imports_is_shipped_anew(master, project):
    project.write("below.py", "value = 1")
    module = project.module("above", "import below\ndef mapfunc(params, part): return below.value")
    assert master.run(module) == 2
    project.write("below.py", "value = 1000")
    importlib.reload(module.below)
    assert master.run(module) == 2000


def test_an_edit_does_not_make_the_data_set_travel_again(master, project):
    module = project.module("edited_on_data", "def mapfunc(params, part): return sum(part)")
    assert master.run(module, None, [11, 12, 13]) == 36
    sent = master.stats().dataset_sent
    project.write("edited_on_data.py", "def mapfunc(params, part): return 10 * sum(part)")
    importlib.reload(module)
    assert master.run(module, None, [11, 12, 13]) == 360
    assert master.stats().dataset_sent == sent


# Modules that cannot be had


def test_a_module_that_was_missing_may_be_written_and_is_found_then(master, project):
    module = project.module("hopeful", "def mapfunc(p, s):\n    import promised\n    return promised.value")
    with pytest.raises(TaskError, match="promised"):
        master.run(module)
    project.write("promised.py", "value = 8")
    assert master.run(module) == 16


def test_a_module_that_fails_while_it_is_imported_is_a_task_error(project):
    project.write("exploding.py", "raise RuntimeError('at import')")
    module = project.module("fuse", "def mapfunc(p, s):\n    import exploding")
    with Master(2) as master:  # the other worker is replaced, if the end of the round interrupts its import
        with pytest.raises(TaskError, match="at import"):
            master.run(module)
        assert master.run(usercode.forty_two) == 84


# Functions without a source file


def test_a_lambda_is_run(master):
    assert master.run(lambda params, part: params * 2, 21) == 84


def test_a_closure_is_run_with_what_it_holds_now(master):
    results = []
    for held in (10, 20):

        def closure(params, part):
            return held + params

        results.append(master.run(closure, 1))
    assert results == [22, 42]


def test_any_callable_is_run(master):
    class Adder:
        def __init__(self, base):
            self.base = base

        def __call__(self, params, part):
            return self.base + params

        def method(self, params, part):
            return self.base * params

    assert master.run(Adder(1), 2) == 6
    assert master.run(Adder(3).method, 2) == 12
    assert master.run(functools.partial(lambda base, params, part: base + params, 1), 2) == 6
    assert master.run(operator.mul, 2, [1, 2, 3, 4]) == [4, 6, 4, 6]


def test_a_lambda_may_use_project_modules(master, project):
    helper = project.module("helping", "value = 9")
    assert master.run(lambda params, part: helper.value) == 18


def test_a_recursive_local_function_is_run(master):
    def factorial(params, part):
        return params * factorial(params - 1, part) if params else 1

    assert master.run(factorial, 5) == 240


def test_a_module_that_was_made_on_the_fly_is_run(master):
    module = type(gather)("no_file")
    exec("def helper(): return 21\ndef mapfunc(params, part): return helper()", vars(module))
    assert master.run(module) == 42


# Scripts and notebooks


def test_functions_of_a_script_are_run(tmp_path):
    (tmp_path / "neighbour.py").write_text("value = 10")
    script = """
        import neighbour
        from qjam import Master

        BASE = 1

        def helper(x):
            return x + BASE + neighbour.value

        def work(params, part):
            import late_neighbour
            return helper(params) + late_neighbour.value

        with Master(2) as master:
            print(master.run(work, 1000))
            BASE = 2
            print(master.run(work, 1000))
        """
    (tmp_path / "late_neighbour.py").write_text("value = 100")
    assert output(tmp_path, script).split() == ["2222", "2224"]


def test_a_script_may_give_itself_as_the_module(tmp_path):
    script = """
        import sys
        from qjam import Master

        def mapfunc(params, part):
            return str(part[0])

        def reduce(a, b):
            return f"({a} {b})"

        if __name__ == "__main__":
            with Master(2) as master:
                print(master.run(sys.modules["__main__"], None, [1, 2]))
        """
    assert output(tmp_path, script) == "(1 2)\n"


def test_classes_of_a_script_come_back_as_its_own(tmp_path):
    script = """
        from dataclasses import dataclass
        from typing import NamedTuple
        from qjam import Master, TaskError

        @dataclass
        class Point:
            x: int

        class Pair(NamedTuple):
            a: int
            b: int

        class Trouble(Exception):
            pass

        def work(params, part):
            assert type(params) is Point, type(params)
            return {"point": Point(params.x + 1), "pair": Pair(1, 2)}

        def fail(params, part):
            raise Trouble("here")

        with Master(2) as master:
            result = master.run(work, Point(1), [0])
            print(type(result["point"]) is Point, result["point"] == Point(2))
            print(type(result["pair"]) is Pair, result["pair"] == Pair(1, 2))
            try:
                master.run(fail)
            except TaskError as error:
                print(type(error.__cause__) is Trouble, error.__cause__)
        """
    assert output(tmp_path, script).splitlines() == ["True True", "True True", "True here"]


def test_classes_of_a_script_that_only_its_helpers_name_come_back_as_its_own(tmp_path):
    script = """
        from qjam import Master

        class Point:
            pass

        def helper():
            return Point()

        def work(params, part):
            return {"point": helper()}

        with Master(1) as master:
            print(type(master.run(work)["point"]) is Point)
        """
    assert output(tmp_path, script) == "True\n"


def test_functions_of_a_notebook_are_run_as_they_were_defined_last(tmp_path):
    # A notebook's cells are run one by one in the namespace of __main__, and no file holds them.
    script = """
        import sys
        cells = [
            "from qjam import Master\\nmaster = Master(2)",
            "FACTOR = 2\\ndef helper(x): return FACTOR * x",
            "def work(params, part): return helper(params)",
            "print(master.run(work, 1))",
            "FACTOR = 3",
            "print(master.run(work, 1))",
            "def helper(x): return 100 * x",
            "print(master.run(work, 1))",
            "class Box: pass",
            "def boxed(params, part): return {'box': Box()}",
            "print(type(master.run(boxed, None, [1])['box']) is Box)",
            "print(master.run(lambda params, part: FACTOR))",
            "master.close()",
        ]
        for number, cell in enumerate(cells):
            exec(compile(cell, f"<cell {number}>", "exec"), vars(sys.modules["__main__"]))
        """
    assert output(tmp_path, script).split() == ["4", "6", "200", "True", "6"]


def test_a_namespace_of_the_users_own_making_will_do(master):
    namespace = {"__name__": "a notebook"}
    exec("def helper(x): return x + 1\ndef work(params, part): return helper(params)", namespace)
    assert master.run(namespace["work"], 20) == 42


def test_byte_code_for_another_python_is_refused_in_words(master, monkeypatch):
    monkeypatch.setattr("qjam.code.user_code.PYTHON", "3.4")
    with pytest.raises(TaskError, match=r"byte code of python 3\.4, and this host has .*: put it into a module"):
        master.run(lambda params, part: "for another python")


def test_byte_code_in_params_slices_and_results_of_another_python_is_refused_in_words(master, monkeypatch):
    """A 3.13 that runs byte code of 3.11 is killed by it. Here it is the master that takes itself for another one."""
    monkeypatch.setattr("qjam_worker.values.functions.PYTHON", "3.4")
    words = r"travels as byte code of python 3\.4, and here is python {}: put it into a module".format
    here = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(TaskError, match=words(here)):
        master.run(usercode.give_params, lambda: 1)
    with pytest.raises(TaskError, match=words(here)):
        master.run(usercode.forty_two, None, [lambda: 1])
    with pytest.raises(QjamError, match=rf"a result .* byte code of python {here}, and here is python 3\.4"):
        master.run(usercode.give_a_lambda, None, [1])
    assert master.run(usercode.forty_two) == 84


def test_what_is_no_byte_code_is_for_any_python(master, monkeypatch):
    monkeypatch.setattr("qjam.code.user_code.PYTHON", "3.4")
    assert master.collect(operator.is_not, 1, [[1]]) == [True]
