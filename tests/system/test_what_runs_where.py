"""The code that is loaded here is the code that runs there; what this program can import, workers can import."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
import sysconfig
import textwrap
import threading
import zipfile

import pytest

import pyzmq_garbage  # noqa: F401
from needs import need
from projects import Project, project  # noqa: F401
from qjam import Master, TaskError
from ssh_hosts import home  # noqa: F401
from sshd import private_sshd, sshd_works, write_config


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory, home):
    """A file that leads to the host a."""
    need(sshd_works())
    folder = tmp_path_factory.mktemp("sshd")
    with private_sshd(folder, name="a", home=home) as host:
        yield write_config(folder / "config", [host])


@pytest.fixture(scope="module", params=["local", "ssh"])
def master(request):
    config = request.getfixturevalue("ssh_config") if request.param == "ssh" else None
    with Master("local*2" if config is None else "a*2", ssh_config=config) as master:
        yield master


def is_local(master: Master) -> bool:
    return master.workers[0].host == "local"


# The module object counts


def by_path(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_modules_of_one_name_are_two(master, project):
    project.write("one/model.py", "import helper\nSCALE = 2\ndef mapfunc(p, s): return SCALE * sum(s)")
    project.write("two/model.py", "SCALE = 30\ndef mapfunc(p, s): return SCALE * sum(s)")
    project.write("helper.py", "")
    one = by_path(project.folder / "one" / "model.py", "model")
    two = by_path(project.folder / "two" / "model.py", "model")
    for _ in range(2):
        assert master.run(one, None, [1, 2]) == 6
        assert master.run(two, None, [1, 2]) == 90


def test_of_two_modules_of_one_name_that_were_imported_each_is_itself(master, project, monkeypatch):
    project.write("first/twin.py", "def mapfunc(p, s): return 'first'")
    project.write("second/twin.py", "def mapfunc(p, s): return 'second'")
    loaded = []
    for folder in ("first", "second"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(project.folder / folder))
            sys.modules.pop("twin", None)
            loaded.append(importlib.import_module("twin"))
    for _ in range(2):
        assert [master.run(module, None, [1]) for module in loaded] == ["first", "second"]
    assert [master.run(module.mapfunc, None, [1]) for module in loaded] == ["first", "second"]


def test_what_two_modules_of_one_name_import_is_what_each_has_imported(master, project, monkeypatch):
    for folder in ("red", "blue"):
        project.write(f"{folder}/tool.py", f"def value(): return {folder!r} + SUFFIX\nSUFFIX = '!'")
        project.write(f"{folder}/user.py", "import tool\ndef mapfunc(p, s): return tool.value()")
    loaded = []
    for folder in ("red", "blue"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(project.folder / folder))
            for name in ("tool", "user"):
                sys.modules.pop(name, None)
            loaded.append(importlib.import_module("user"))
    for _ in range(2):
        assert [master.run(module, None, [1]) for module in loaded] == ["red!", "blue!"]


def test_a_module_of_a_folder_that_is_no_longer_on_the_path_runs(master, project):
    module = project.module("wanderer", "def mapfunc(p, s): return 5")
    sys.path.remove(str(project.folder))
    assert master.run(module, None, [1]) == 5


# Edits


def warnings_about(caplog, path) -> list[str]:
    return [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]


@pytest.mark.parametrize("when", ["before the first run", "between runs"])
def test_an_edit_without_a_reload_is_not_taken_and_told_once(master, project, caplog, when):
    module = project.module("steady", "RATE = 1\ndef mapfunc(p, s): return RATE")
    if when == "between runs":
        assert master.run(module, None, [1]) == 1
    project.write("steady.py", "RATE = 2222\ndef mapfunc(p, s): return RATE")
    for _ in range(3):
        assert master.run(module, None, [1]) == 1
        assert master.run(module.mapfunc, None, [1]) == 1
    assert len(warnings_about(caplog, project.folder / "steady.py")) == 1
    importlib.reload(module)
    assert master.run(module, None, [1]) == 2222
    assert len(warnings_about(caplog, project.folder / "steady.py")) == 1


@pytest.mark.parametrize("left", ["def mapfunc(p, s): retu", None, ""])
def test_a_half_saved_or_deleted_file_disturbs_nothing(master, project, left):
    project.write("fragile_helper.py", "value = 7")
    module = project.module("fragile", "import fragile_helper\ndef mapfunc(p, s): return fragile_helper.value")
    for name in ("fragile.py", "fragile_helper.py"):
        if left is None:
            (project.folder / name).unlink()
        else:
            project.write(name, left)
    assert master.run(module, None, [1]) == 7


def test_a_reload_that_fails_leaves_what_is_loaded(master, project):
    module = project.module("failing", "def mapfunc(p, s): return 3")
    assert master.run(module, None, [1]) == 3
    project.write("failing.py", "def mapfunc(p, s): retu rn")
    with pytest.raises(SyntaxError):
        importlib.reload(module)
    assert master.run(module, None, [1]) == 3


def test_a_helper_that_was_reloaded_is_taken_by_who_imports_it_as_a_module(master, project):
    project.write("kit.py", "def f(): return 1")
    module = project.module("user_of_kit", "import kit\ndef mapfunc(p, s): return kit.f()")
    assert master.run(module, None, [1]) == 1
    project.write("kit.py", "def f(): return 22")
    importlib.reload(module.kit)
    assert master.run(module, None, [1]) == module.mapfunc(None, None) == 22


def test_autoreload_of_ipython_takes_the_edit(master, project, tmp_path):
    program = tmp_path / "notebook.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        from IPython.core.interactiveshell import InteractiveShell
        sys.path.insert(0, {str(project.folder)!r})
        shell = InteractiveShell.instance()
        def cell(text):
            result = shell.run_cell(text)
            result.raise_error()
            return result.result
        cell("%load_ext autoreload\\n%autoreload 2")
        cell("from qjam import Master\\nimport watched\\nmaster = Master(1)")
        cell("print(master.run(watched, None, [1]))")
        file = {str(project.folder / "watched.py")!r}
        with open(file, "w") as out: out.write("def helper(): return 40\\ndef mapfunc(p, s): return helper() + 2\\n")
        os.utime(file, (time.time() + 5,) * 2)
        cell("print(master.run(watched, None, [1]), watched.mapfunc(None, None))")
        cell("master.close()")
        """)
    )
    project.write("watched.py", "def helper(): return 4\ndef mapfunc(p, s): return helper() + 1\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["5", "42", "42"], done.stdout + done.stderr
    assert "changed on disk" not in done.stderr


# State that was set here


SETTINGS = """
    RATE = 1
    TABLE = {"rate": 1}
    NAMES = ["a"]
    class Config:
        rate = 1
        table = {}
        def __init__(self): self.rate = 1
        def read(self): return self.rate
    config = Config()
    def rate(): return 1
    def counted(): return counted.rate
    counted.rate = 1
    """


def _set_name(settings):
    settings.RATE = 10


def _set_in_dict(settings):
    settings.TABLE["rate"] = 10


def _set_on_class(settings):
    settings.Config.rate = 10


def _set_on_object(settings):
    settings.config.rate = 10


def _set_function(settings):
    settings.rate = lambda: 10


def _set_wrapped(settings):
    import functools

    original = settings.rate

    @functools.wraps(original)
    def ten_times():
        return 10 * original()

    settings.rate = ten_times


def _set_method(settings):
    settings.Config.read = lambda self: 10


def _set_attribute_of_function(settings):
    settings.counted.rate = 10


def _set_new_name(settings):
    settings.NEW = 10


def _append(settings):
    settings.NAMES.append("b")


CHANGES = [
    (_set_name, "settings.RATE", 1, 10),
    (_set_in_dict, "settings.TABLE['rate']", 1, 10),
    (_set_on_class, "settings.Config.rate", 1, 10),
    (_set_on_object, "settings.config.rate", 1, 10),
    (_set_function, "settings.rate()", 1, 10),
    (_set_wrapped, "settings.rate()", 1, 10),
    (_set_method, "settings.Config().read()", 1, 10),
    (_set_attribute_of_function, "settings.counted()", 1, 10),
    (_set_new_name, "getattr(settings, 'NEW', 1)", 1, 10),
    (_append, "''.join(settings.NAMES)", "a", "ab"),
]


@pytest.mark.parametrize("when", ["before the first run", "between runs"])
@pytest.mark.parametrize(("change", "expression", "before", "after"), CHANGES)
def test_state_that_was_set_on_a_module_travels(master, project, when, change, expression, before, after):
    project.write("settings.py", SETTINGS)
    module = project.module("worker_code", f"import settings\ndef mapfunc(p, s): return {expression}")
    if when == "between runs":
        assert master.run(module, None, [1]) == before
    change(sys.modules["settings"])
    assert module.mapfunc(None, None) == after
    assert master.run(module, None, [1]) == after
    assert master.run(lambda p, s: module.mapfunc(p, s), None, [1]) == after


def test_a_mapfunc_that_was_patched_is_the_one_that_runs(master, project):
    module = project.module("patched", "def other(p, s): return 2\ndef mapfunc(p, s): return 1")
    assert master.run(module, None, [1]) == 1
    module.mapfunc = lambda p, s: 7
    assert master.run(module, None, [1]) == 7
    module.mapfunc = module.other
    assert master.run(module, None, [1]) == 2
    importlib.reload(module)
    assert master.run(module, None, [1]) == 1


def test_state_that_was_deleted_is_gone_there_too(master, project):
    module = project.module("shrunk", "VALUE = 1\ndef mapfunc(p, s): return int('VALUE' in globals())")
    del module.VALUE
    assert master.run(module, None, [1]) == 0


def test_state_that_cannot_travel_is_told_once(master, project, caplog):
    module = project.module("stuck", "handle = None\ndef mapfunc(p, s): return handle is None")
    module.handle = threading.Lock()
    for _ in range(2):
        assert master.run(module, None, [1]) == 1
    assert len([1 for record in caplog.records if "stuck.handle" in record.getMessage()]) == 1


def test_what_module_code_computes_for_its_host_is_computed_there(master, project):
    module = project.module("placed", "import os\nPID = os.getpid()\ndef mapfunc(p, s): return PID == os.getpid()")
    assert master.run(module, None, [1]) == 1


def test_state_that_changes_each_round_is_told_of(project, caplog):
    module = project.module("moving", "RATE = 0\ndef mapfunc(p, s): return RATE")
    caplog.set_level(logging.INFO, "qjam")
    with Master(1) as master:
        for rate in range(8):
            module.RATE = rate
            assert master.run(module, None, [1]) == rate
    assert len([1 for record in caplog.records if "moving changes from round to round" in record.getMessage()]) == 1


# Modules that come later


def test_an_optional_module_that_appears_later_is_imported_then(master, project):
    source = """
        try:
            import accelerator
        except ImportError:
            accelerator = None
        def mapfunc(p, s): return accelerator is not None and accelerator.value
        """
    module = project.module("hopeful", source)
    assert master.run(module, None, [1]) == 0
    project.write("accelerator.py", "value = 3")
    importlib.reload(module)
    assert master.run(module, None, [1]) == 3


def test_an_optional_module_inside_mapfunc_that_appears_later_is_imported_then(master, project):
    source = """
        def mapfunc(p, s):
            try:
                import booster
            except ImportError:
                return 0
            return booster.value
        """
    module = project.module("patient", source)
    assert master.run(module, None, [1]) == 0
    project.write("booster.py", "value = 4")
    assert master.run(module, None, [1]) == 4


@pytest.mark.parametrize("name", ["statistics", "cgi", "this", "colorsys"])
def test_a_name_of_the_standard_library_that_is_imported_late_is_the_projects(master, project, name):
    if name not in sys.stdlib_module_names or name in sys.modules:
        name = "antigravity"
    project.write(f"{name}.py", "value = 9")
    module = project.module("latecomer", f"def mapfunc(p, s):\n    import {name}\n    return {name}.value")
    assert name not in sys.modules
    assert master.run(module, None, [1]) == 9


# What this program can import


def test_a_folder_that_ends_in_site_packages_is_a_folder_of_the_path(project):
    project.write("vendor/site-packages/vendored.py", "value = 11")
    sys.path.insert(0, str(project.folder / "vendor" / "site-packages"))
    module = project.module("needs_vendored", "import vendored\ndef mapfunc(p, s): return vendored.value")
    with Master(2) as master:
        assert master.run(module, None, [1]) == 11


def test_a_folder_that_is_put_on_the_path_between_rounds_is_found(project):
    module = project.module("early", "def mapfunc(p, s):\n    import from_later\n    return from_later.value")
    with Master(2) as master:
        with pytest.raises(TaskError, match="from_later"):
            master.run(module, None, [1])
        project.write("later/dist-packages/from_later.py", "value = 12")
        sys.path.append(str(project.folder / "later" / "dist-packages"))
        assert master.run(module, None, [1]) == 12


def test_modules_and_data_in_a_zip_file_travel(master, project):
    file = project.folder / "bundle.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("zipped/__init__.py", "# coding: latin-1\nfrom .part import value\n")
        archive.writestr("zipped/part.py", "value = 'äöü'\n")
        archive.writestr("zipped/data.txt", "text in a zip")
        archive.writestr("flat_in_zip.py", "value = 14")
    sys.path.insert(0, str(file))
    source = """
        import pkgutil
        import flat_in_zip
        import zipped
        def mapfunc(p, s):
            return [flat_in_zip.value, zipped.value, pkgutil.get_data("zipped", "data.txt")]
        """
    module = project.module("opener", source)
    assert master.run(module, None, [1]) == [14, "äöü", b"text in a zip"]


FINDER = """
    import importlib.abc, importlib.machinery, sys
    class Finder(importlib.abc.MetaPathFinder, importlib.abc.{base}):
        def find_spec(self, name, path=None, target=None):
            if name == "conjured":
                return importlib.machinery.ModuleSpec(name, self)
        {body}
    """


@pytest.mark.parametrize(
    ("base", "body"),
    [
        ("InspectLoader", "def get_source(self, name): return 'value = 15'"),
        ("Loader", "def exec_module(self, module): module.value = 15"),
    ],
)
def test_a_finder_of_the_users_is_asked(project, monkeypatch, base, body):
    finders = project.module(f"finders_{base.lower()}", FINDER.format(base=base, body=body))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finders.Finder()])
    module = project.module("conjurer", "import conjured\ndef mapfunc(p, s): return conjured.value")
    with Master(2) as master:
        assert master.run(module, None, [1]) == 15


def test_what_a_finder_has_the_source_of_travels_to_any_host(master, project, monkeypatch):
    finders = project.module(
        "source_finder",
        FINDER.format(base="InspectLoader", body="def get_source(self, name): return 'value = 16'"),
    )
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finders.Finder()])
    module = project.module("conjurer", "import conjured\ndef mapfunc(p, s): return conjured.value")
    assert master.run(module, None, [1]) == 16


def test_a_namespace_package_may_be_half_installed(master, project):
    project.write("site-packages/halves/installed.py", "value = 1")
    project.write("halves/own.py", "value = 2")
    sys.path.append(str(project.folder / "site-packages"))
    source = """
        import halves.own
        def mapfunc(p, s):
            if p:
                from halves import installed
                return installed.value + halves.own.value
            return halves.own.value
        """
    module = project.module("of_halves", source)
    assert master.run(module, False, [1]) == 2
    if is_local(master):
        assert master.run(module, True, [1]) == 3
    else:
        with pytest.raises(TaskError, match="installed"):
            master.run(module, True, [1])


EXTENSION = r"""
    #include <Python.h>
    static PyObject *value(PyObject *self, PyObject *args) { return PyLong_FromLong(17); }
    static PyMethodDef methods[] = {{"value", value, METH_NOARGS, ""}, {NULL}};
    static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "fast", "", -1, methods};
    PyMODINIT_FUNC PyInit_fast(void) { return PyModule_Create(&def); }
    """


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The file of an extension module `fast` for this python."""
    folder = tmp_path_factory.mktemp("extension")
    (folder / "fast.c").write_text(textwrap.dedent(EXTENSION))
    file = folder / f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    include = sysconfig.get_paths()["include"]
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", str(folder / "fast.c"), "-o", str(file)], check=True)
    return file


@pytest.mark.parametrize("name", ["mixed.fast", "fast"])
def test_an_extension_module_in_place_works_here_and_is_named_elsewhere(master, project, extension, name):
    project.write("mixed/__init__.py", "")
    place = project.folder / ("mixed" if "." in name else "") / extension.name
    place.write_bytes(extension.read_bytes())
    importlib.invalidate_caches()
    module = project.module("uses_fast", f"def mapfunc(p, s):\n    import {name} as fast\n    return fast.value()")
    if is_local(master):
        assert master.run(module, None, [1]) == 17
    else:
        with pytest.raises(TaskError) as caught:
            master.run(module, None, [1])
        assert str(place) in str(caught.value)
        assert "HostSpec(python=" in str(caught.value)


PLUGGED = {
    "plugged/__init__.py": """
        import importlib, pkgutil
        def names():
            return sorted(found.name for found in pkgutil.iter_modules(__path__))
        def load(name):
            return importlib.import_module(f"plugged.{name}").value
        """,
    "plugged/one.py": "value = 1",
    "plugged/two.py": "value = 2",
    "plugged/deep/__init__.py": "",
    "plugged/deep/table.csv": "1,2,3",
    "plugged/words.txt": "some words",
}


def test_package_data_and_plug_ins_travel(master, project):
    for name, text in PLUGGED.items():
        project.write(name, text)
    source = """
        import os, pkgutil
        from importlib import resources
        from pathlib import Path
        import plugged, plugged.deep
        def mapfunc(p, s):
            return [
                plugged.names(),
                [plugged.load("one"), plugged.load("two")],
                (resources.files("plugged") / "words.txt").read_text(),
                resources.files(plugged.deep).joinpath("table.csv").read_text(),
                pkgutil.get_data("plugged", "words.txt").decode(),
                Path(plugged.__file__).with_name("words.txt").read_text(),
                Path(plugged.deep.__file__).parent.joinpath("table.csv").read_text(),
                sorted(os.listdir(os.path.dirname(plugged.deep.__file__))).index("table.csv") >= 0,
                str(Path(plugged.__file__)),
            ]
        """
    module = project.module("reader", source)
    *found, place = master.run(module, None, [1])
    words, table = "some words", "1,2,3"
    assert found == [["deep", "one", "two"], [1, 2], words, table, words, words, table, True]
    assert place.startswith(str(project.folder)) is is_local(master)


def test_a_plug_in_that_cannot_travel_is_listed_and_named(master, project, extension):
    for name, text in PLUGGED.items():
        project.write(name, text)
    place = project.folder / "plugged" / extension.name
    place.write_bytes(extension.read_bytes())
    module = project.module("lister", "import plugged\ndef mapfunc(p, s): return plugged.names()")
    assert master.run(module, None, [1]) == ["deep", "fast", "one", "two"]
    module = project.module("loads", "import plugged\ndef mapfunc(p, s): return plugged.load('fast')()")
    if is_local(master):
        assert master.run(module, None, [1]) == 17
    else:
        with pytest.raises(TaskError) as caught:
            master.run(module, None, [1])
        assert str(place) in str(caught.value)


def test_what_a_package_has_too_much_of_is_told(master, project, caplog, monkeypatch):
    monkeypatch.setattr("qjam.code.project.MAX_DATA", 1000)
    project.write("weighty/__init__.py", "value = 1")
    project.write("weighty/large.bin", "x" * 2000)
    module = project.module("lifts", "import weighty\ndef mapfunc(p, s): return weighty.value")
    assert master.run(module, None, [1]) == 1
    assert any("large.bin" in record.getMessage() for record in caplog.records)


def test_an_installed_package_travels_if_it_is_named(master, project, request):
    project.write("site-packages/mypkg/__init__.py", "from .inner import value")
    project.write("site-packages/mypkg/inner.py", "value = 18")
    sys.path.append(str(project.folder / "site-packages"))
    module = project.module("uses_mypkg", "def mapfunc(p, s):\n    import mypkg\n    return mypkg.value")
    if is_local(master):
        assert master.run(module, None, [1]) == 18
        return
    with pytest.raises(TaskError) as caught:
        master.run(module, None, [1])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "No module named 'mypkg'" in str(caught.value)
    assert 'ship=["mypkg"]' in str(caught.value)
    assert "HostSpec(python=" in str(caught.value)
    with Master("a", ssh_config=request.getfixturevalue("ssh_config"), ship=["mypkg"]) as other:
        assert other.run(module, None, [1]) == 18


@pytest.mark.parametrize(
    ("ship", "says"),
    [("mypkg", "a list of names"), (["no_such_package"], "no module"), (["numpy"], "extension"), (["sys"], "itself")],
)
def test_what_cannot_be_shipped_is_refused_by_name(ship, says):
    with pytest.raises((TypeError, ValueError), match=rf"ship.*{says}"):
        Master(1, ship=ship)


POOLS = {
    "spawn": """import multiprocessing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(helping.twice, s)""",
    "executor": """import concurrent.futures, multiprocessing
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(helping.twice, s))""",
    "loky": """import loky
    pool = loky.ProcessPoolExecutor(1)
    try:
        return list(pool.map(helping.twice, s))
    finally:
        pool.shutdown()""",
}


@pytest.mark.parametrize("kind", POOLS)
def test_pools_inside_mapfunc_can_import_the_shipped_code(project, kind):
    project.write("helping.py", "def twice(x): return 2 * x")
    module = project.module("nesting", f"import helping\ndef mapfunc(p, s):\n    {POOLS[kind]}")
    with Master(1) as master:
        assert master.run(module, None, [4, 5]) == [8, 10]
