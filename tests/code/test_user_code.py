"""User code becomes a UserCode; modules of the user's project are sent, installed ones are not."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import msgpack
import pytest

from qjam.code import project as of_project
from qjam.code import user_code
from qjam.code.user_code import Sources, UserCode

MAPFUNC = "def mapfunc(params, data):\n    return params\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(project: Path, path: str, text: str = MAPFUNC) -> Path:
    file = project / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def load(project: Path, path: str, text: str = MAPFUNC) -> types.ModuleType:
    """Write a module into the project and import it."""
    write(project, path, text)
    importlib.invalidate_caches()
    return importlib.import_module(path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))


def found(name: str) -> dict[str, Any] | None:
    """Returns what a worker is told of a module, without what is empty."""
    answer: dict[str, Any] | None = msgpack.unpackb(Sources().lookup(name))
    return answer and {field: value for field, value in answer.items() if value and field != "tree"}


def by_value(user_code: UserCode) -> tuple[Callable[..., Any], Any]:
    """Returns the functions that a worker loads from the code."""
    assert user_code.code is not None
    pair: tuple[Callable[..., Any], Any] = cloudpickle.loads(user_code.code)
    return pair


# ---- code of modules --------------------------------------------------------------------------------------


def test_a_module_of_the_project_goes_by_name(project: Path) -> None:
    user_code = Sources().user_code(load(project, "plain.py"))
    assert user_code.code is None
    assert user_code.header["module"] == "plain"
    assert user_code.header["function"] is None
    assert user_code.header["shipped"] is True
    assert user_code.header["reduce"] is False


def test_a_module_that_is_installed_goes_by_name_and_is_not_shipped(project: Path) -> None:
    installed = load(project, "thing.py")
    assert installed.__spec__ is not None
    installed.__spec__.origin = str(write(project, "site-packages/thing.py"))
    assert Sources().user_code(installed).header["shipped"] is False


def test_the_reduce_of_a_module_is_used(project: Path) -> None:
    module = load(project, "adding.py", MAPFUNC + "def reduce(a, b):\n    return a\n")
    user_code = Sources().user_code(module)
    assert user_code.header["reduce"] is True
    assert user_code.reduce is module.reduce


def test_the_reduce_of_functools_is_not_meant(project: Path) -> None:
    user_code = Sources().user_code(load(project, "importing.py", "from functools import reduce\n" + MAPFUNC))
    assert user_code.header["reduce"] is False
    assert user_code.reduce is None


def test_a_reduce_that_cannot_be_called_is_not_meant(project: Path) -> None:
    assert Sources().user_code(load(project, "number.py", MAPFUNC + "reduce = 3\n")).reduce is None


def test_equal_code_has_an_equal_key(project: Path) -> None:
    sources, module = Sources(), load(project, "same.py")
    assert sources.user_code(module).key == sources.user_code(module).key


def test_different_modules_have_different_keys(project: Path) -> None:
    sources = Sources()
    assert sources.user_code(load(project, "one.py")).key != sources.user_code(load(project, "two.py")).key


@pytest.mark.parametrize("text", ["", "mapfunc = 3\n"])
def test_a_module_without_mapfunc_is_refused_by_its_name(project: Path, text: str) -> None:
    with pytest.raises(TypeError, match=r"module: lacking has no function mapfunc\(params, slice\)"):
        Sources().user_code(load(project, "lacking.py", text))


@pytest.mark.parametrize("thing", ["plain", 3, None, [1], {"mapfunc": 1}])
def test_what_is_no_module_and_no_function_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be a module .* or a function f\(params, slice\), not "):
        Sources().user_code(thing)


def test_a_module_made_on_the_fly_goes_by_value() -> None:
    module = types.ModuleType("on_the_fly")
    exec("def mapfunc(params, data):\n    return params * 2\ndef reduce(a, b):\n    return a * b\n", vars(module))
    user_code = Sources().user_code(module)
    mapfunc, reduce = by_value(user_code)
    assert mapfunc(21, None) == 42
    assert reduce(2, 3) == 6
    assert user_code.header["reduce"] is True


# ---- code of functions ------------------------------------------------------------------------------------


def test_a_function_of_the_project_goes_by_name(project: Path) -> None:
    user_code = Sources().user_code(load(project, "functions.py", "def f(params, data): pass\n").f)
    assert user_code.code is None
    assert (user_code.header["module"], user_code.header["function"]) == ("functions", "f")


def test_a_function_is_reduced_by_default(project: Path) -> None:
    text = "def f(params, data): pass\ndef reduce(a, b): pass\n"
    assert Sources().user_code(load(project, "functions.py", text).f).header["reduce"] is False


def test_a_static_method_goes_by_its_qualified_name(project: Path) -> None:
    module = load(project, "classes.py", "class C:\n    @staticmethod\n    def f(params, data): pass\n")
    assert Sources().user_code(module.C.f).header["function"] == "C.f"


def test_a_lambda_goes_by_value(project: Path) -> None:
    user_code = Sources().user_code(load(project, "lambdas.py", "f = lambda params, data: params + 1\n").f)
    assert by_value(user_code)[0](1, None) == 2
    assert re.fullmatch("[0-9a-f]{32}", user_code.header["code"])


def test_a_closure_goes_by_value_with_what_it_closes_over(project: Path) -> None:
    text = "def make(n):\n    def f(params, data):\n        return params + n\n    return f\n"
    user_code = Sources().user_code(load(project, "closures.py", text).make(5))
    assert by_value(user_code)[0](1, None) == 6


def test_different_closures_of_one_function_have_different_keys(project: Path) -> None:
    text = "def make(n):\n    def f(params, data):\n        return params + n\n    return f\n"
    make, sources = load(project, "closures.py", text).make, Sources()
    assert sources.user_code(make(1)).key != sources.user_code(make(2)).key
    assert sources.user_code(make(1)).key == sources.user_code(make(1)).key


def test_a_function_that_was_replaced_in_its_module_goes_by_value(project: Path) -> None:
    module = load(project, "replaced.py", "def f(params, data): return 1\n")
    old = module.f
    module.f = lambda params, data: 2
    assert by_value(Sources().user_code(old))[0](None, None) == 1


def test_a_partial_goes_by_value(project: Path) -> None:
    f = load(project, "partial.py", "def f(n, params, data): return n\n").f
    user_code = Sources().user_code(functools.partial(f, 7))
    assert by_value(user_code)[0](None, None) == 7


def test_an_object_that_can_be_called_goes_by_value(project: Path) -> None:
    text = "class C:\n    def __call__(self, params, data): return 9\n"
    assert by_value(Sources().user_code(load(project, "callables.py", text).C()))[0](None, None) == 9


def test_a_function_that_cannot_be_pickled_is_refused_by_its_name(project: Path) -> None:
    text = "import threading\ndef make(lock):\n    def f(params, data):\n        lock\n    return f\n"
    with pytest.raises(TypeError, match="module: the function f cannot be sent to workers: "):
        Sources().user_code(load(project, "locks.py", text).make(threading.Lock()))


def test_a_function_of_a_script_goes_by_value(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "script.py",
        """
import json
import pickle
import sys
from qjam.code.user_code import Sources

FACTOR = 3

def helper(x):
    return FACTOR * x

def mapfunc(params, data):
    return helper(params)

codes = Sources().user_code(mapfunc), Sources().user_code(sys.modules["__main__"])
answers = [pickle.loads(user_code.code)[0](14, None) for user_code in codes]
print(json.dumps([answers, [user_code.header["code"] is not None for user_code in codes]]))
""",
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=root, timeout=30
    )
    assert json.loads(done.stdout) == [[42, 42], [True, True]]


# ---- lookup -------------------------------------------------------------------------------------------------


def test_a_module_of_the_project_is_found_with_its_source(project: Path) -> None:
    path = write(project, "plain.py")
    assert found("plain") == {"source": MAPFUNC.encode(), "path": str(path)}


def test_a_module_is_found_without_being_run(project: Path) -> None:
    write(project, "dangerous.py", "raise SystemExit\n")
    assert found("dangerous") is not None
    assert "dangerous" not in sys.modules


def test_a_package_is_found_by_its_init(project: Path) -> None:
    path = write(project, "package/__init__.py", "x = 1\n")
    assert found("package") == {
        "source": b"x = 1\n",
        "path": str(path),
        "package": True,
        "folders": [str(path.parent)],
    }


def test_the_parts_of_a_package_are_found(project: Path) -> None:
    write(project, "package/__init__.py", "")
    write(project, "package/inner/__init__.py", "")
    path = write(project, "package/inner/deep.py", "from ..other import x\n")
    assert found("package.inner.deep") == {"source": b"from ..other import x\n", "path": str(path)}


def test_the_files_of_a_package_are_found_without_caches_and_hidden_ones(project: Path) -> None:
    write(project, "package/__init__.py", "")
    write(project, "package/inner/data.csv", "1,2")
    write(project, f"package/built{importlib.machinery.EXTENSION_SUFFIXES[0]}", "machine code")
    for name in ("package/__pycache__/x.pyc", "package/.git/config", "package/.env"):
        write(project, name, "secret")
    sources = Sources()
    assert msgpack.unpackb(sources.lookup("package/")) is None  # nobody has asked for the package
    assert msgpack.unpackb(sources.lookup("package"))["tree"]
    files = msgpack.unpackb(sources.lookup("package/"))["files"]
    assert sorted(files) == [["__init__.py", b""], ["built.so", b""], ["inner/data.csv", b"1,2"]]


def test_a_part_that_a_package_does_not_have_is_not_found(project: Path) -> None:
    write(project, "package/__init__.py", "")
    write(project, "plain.py")
    assert found("package.nothing") is None
    assert found("plain.nothing") is None
    assert found("nothing.at.all") is None


def test_a_namespace_package_is_found_without_source(project: Path) -> None:
    path = write(project, "space/part.py", "y = 2\n")
    assert found("space") == {"package": True, "folders": [str(path.parent)]}
    assert found("space.part") == {"source": b"y = 2\n", "path": str(path)}


def test_a_loaded_module_is_found_where_it_was_loaded_from(project: Path, tmp_path: Path) -> None:
    load(project, "moved.py")
    sys.path.remove(str(project))
    assert found("moved") is not None


@pytest.mark.parametrize("name", ["json", "os.path", "sys", "math", "numpy", "numpy.linalg", "msgpack", "zmq"])
def test_what_is_installed_is_not_shipped(name: str) -> None:
    assert found(name) is None


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_what_lies_where_packages_are_installed_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    write(tmp_path, f"{folder}/elsewhere.py")
    write(tmp_path, f"{folder}/elsewhere_space/part.py")
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    assert found("elsewhere") is None
    assert found("elsewhere_space") is None
    assert found("elsewhere_space.part") is None


def test_a_link_to_an_installed_module_is_not_shipped(project: Path) -> None:
    (project / "linked.py").symlink_to(Path(json.__file__).parent / "decoder.py")
    assert found("linked") is None


def test_qjam_is_shipped_wherever_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("qjam.data.datasets") is not None
    monkeypatch.setattr(of_project, "_ENVIRONMENT", (os.path.join(Path(user_code.__file__).parents[2], ""),))
    assert found("qjam.data.datasets") is not None


@pytest.mark.parametrize(
    ("suffix", "kind"), [(importlib.machinery.EXTENSION_SUFFIXES[0], "an extension module"), (".pyc", "byte code")]
)
def test_a_module_without_source_is_refused_by_its_file(project: Path, suffix: str, kind: str) -> None:
    path = write(project, f"compiled{suffix}", "")
    answer = found("compiled")
    assert answer is not None
    assert answer.keys() == {"refused"}
    assert kind in answer["refused"]
    assert str(path) in answer["refused"]


def test_a_module_whose_file_is_gone_is_found_as_it_was_loaded(project: Path) -> None:
    load(project, "gone.py")
    (project / "gone.py").unlink()
    assert found("gone") == {"source": MAPFUNC.encode(), "path": str(project / "gone.py")}


def test_source_that_is_no_utf8_is_shipped_as_it_is(project: Path) -> None:
    (project / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    answer = found("latin")
    assert answer is not None
    assert answer["source"].endswith(b"'\xe4'\n")


def test_the_main_module_cannot_be_imported_by_name() -> None:
    assert not user_code._is_importable(sys.modules["__main__"])


# ---- what is out of date --------------------------------------------------------------------------------------


def time_stands() -> float:
    """A clock by which looking at files takes no time, so that files are looked at each time."""
    return 0.0


def edit(path: Path, text: str) -> None:
    """As an editor does it: another size, or at least another time."""
    path.write_text(text)
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


def test_without_changes_the_epoch_stays(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "steady.py")
    first = sources.user_code(module)
    sources.lookup("steady")
    assert sources.user_code(module).header["epoch"] == first.header["epoch"]


@pytest.mark.parametrize("text", [MAPFUNC.replace("return", "return 1 +"), MAPFUNC])  # other text, saved again
def test_a_reloaded_module_begins_a_new_epoch(project: Path, text: str) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "edited.py")
    first = sources.user_code(module)
    sources.lookup("edited")
    edit(project / "edited.py", text)
    assert sources.user_code(module).key == first.key
    importlib.reload(module)
    second = sources.user_code(module)
    assert second.header["epoch"] > first.header["epoch"]
    assert second.key != first.key


def test_an_edit_of_a_module_that_only_workers_load_begins_a_new_epoch(project: Path) -> None:
    write(project, "used.py", "x = 1\n")
    sources, module = Sources(cpu_clock=time_stands), load(project, "using.py", "def mapfunc(p, s):\n    import used\n")
    first = sources.user_code(module)
    sources.lookup("using")
    sources.lookup("used")
    edit(project / "used.py", "x = 2\n")
    assert sources.user_code(module).key != first.key


def test_a_reload_of_what_no_worker_has_begins_no_new_epoch(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "lonely.py")
    first = sources.user_code(module)
    edit(project / "lonely.py", "x = 1\n" + MAPFUNC)
    importlib.reload(module)
    assert sources.user_code(module).key == first.key


def test_one_reload_begins_one_epoch(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "once.py")
    sources.lookup("once")
    edit(project / "once.py", "x = 1\n" + MAPFUNC)
    importlib.reload(module)
    second = sources.user_code(module)
    sources.lookup("once")
    assert sources.user_code(module).key == second.key


def test_a_function_sent_by_value_has_a_new_key_after_a_reload(project: Path) -> None:
    # It may refer to the module that was reloaded, by name.
    sources = Sources(cpu_clock=time_stands)
    helper = load(project, "helper.py", "x = 1\n")
    f = load(project, "values.py", "f = lambda params, data: None\n").f
    first = sources.user_code(f)
    sources.lookup("helper")
    importlib.reload(helper)
    assert sources.user_code(f).key != first.key


def test_state_that_was_set_begins_a_new_epoch_and_what_was_not_does_not(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "stateful.py", "RATE = 1\n" + MAPFUNC)
    first = sources.user_code(module)
    assert msgpack.unpackb(sources.lookup("stateful"))["state"] == b""
    module.RATE = 2
    second = sources.user_code(module)
    assert second.key != first.key
    assert msgpack.unpackb(sources.lookup("stateful"))["state"]
    assert sources.user_code(module).key == second.key
    module.RATE = 1
    assert sources.user_code(module).key != second.key
    assert msgpack.unpackb(sources.lookup("stateful"))["state"] == b""


def test_a_folder_added_to_the_path_begins_a_new_epoch(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "pathless.py")
    first = sources.user_code(module)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project / "more")])
    assert sources.user_code(module).key != first.key


def test_a_module_that_was_missing_begins_a_new_epoch_when_it_appears(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "hoping.py")
    first = sources.user_code(module)
    sources.lookup("promised")
    write(project, "unrelated.py")
    assert sources.user_code(module).key == first.key
    write(project, "promised.py")
    assert sources.user_code(module).key != first.key


def test_what_is_forgotten_is_looked_for_anew(project: Path) -> None:
    sources, module = Sources(cpu_clock=time_stands), load(project, "again.py")
    first = sources.user_code(module)
    sources.forget()
    assert sources.user_code(module).header["epoch"] > first.header["epoch"]


def test_an_edit_while_the_source_is_being_read_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "racing.py")
    sources, module = Sources(cpu_clock=time_stands), load(project, "racer.py")
    first = sources.user_code(module)
    read = of_project.read

    def read_and_edit(spec: importlib.machinery.ModuleSpec) -> of_project.Found:
        answer = read(spec)
        edit(project / "racing.py", "x = 1\n" + MAPFUNC)
        return answer

    monkeypatch.setattr(of_project, "read", read_and_edit)
    sources.lookup("racing")
    monkeypatch.setattr(of_project, "read", read)
    assert sources.user_code(module).key != first.key
