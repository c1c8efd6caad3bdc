"""Tracebacks of functions that have no file on the host: of scripts, notebooks, and what was compiled at run time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from own_programs import hosts, script  # noqa: F401
from ssh_hosts import home, ssh_host  # noqa: F401


def test_functions_of_a_script_show_file_line_and_source(script, tmp_path):
    source = """
        import functools
        from qjam import Master, TaskError

        def plain(params, part):
            return inner(params)

        def inner(x):
            return 1 / x  # inner

        @functools.lru_cache
        def cached(params, part):
            def nested():
                return (lambda: params[0])()  # nested
            return nested()

        class Model:
            def method(self, params, part):
                raise ValueError("in a method")  # method

            def __call__(self, params, part):
                return [
                    self.method(params, part)
                    for _ in range(1)
                ]

        with Master(HOSTS) as master:
            for function in (plain, cached, Model().method, Model(), lambda params, part: params.lambda_):
                for _ in range(2):
                    try:
                        master.run(function, 0)
                    except TaskError as error:
                        print(error.remote_traceback)
        """
    lines = [line.strip() for line in script(source)]
    text = (tmp_path / "script.py").read_text().splitlines()
    for quoted in (
        "return inner(params)",
        "return 1 / x  # inner",
        "return nested()",
        "return (lambda: params[0])()  # nested",
        'raise ValueError("in a method")  # method',
        "self.method(params, part)",
        "for function in (plain, cached, Model().method, Model(), lambda params, part: params.lambda_):",
    ):
        number = next(number for number, line in enumerate(text, 1) if line.strip() == quoted)
        above = [lines[i - 1] for i, line in enumerate(lines) if line == quoted]
        assert len(above) >= 2, quoted
        assert all(line.startswith(f'File "{tmp_path / "script.py"}", line {number}, in ') for line in above), above


CELLS = [
    "from qjam import Master, TaskError\nmaster = Master(HOSTS)",
    "def helper(x):\n    # a comment\n    return 1 / x",
    "def work(params, part):\n    return helper(params)",
    "class Model:\n\n    def __call__(self, params, part):\n        return self.missing",
    "def show(function):\n    try:\n        master.run(function, 0, [0])\n    except TaskError as e:\n        print(e)",
    "show(work); show(Model())",
    "def helper(x):\n    return undefined",
    "show(work)",
    "master.close()",
]


@pytest.mark.parametrize("names", ["terminal", "kernel"])
def test_functions_of_a_notebook_show_cell_line_and_source(hosts, tmp_path, names):
    kernel = """
        import tempfile
        from IPython.core.compilerop import CachingCompiler
        class Compiler(CachingCompiler):  # as ipykernel's, which names files that do not exist
            def get_code_name(self, raw, code, number):
                return f"/tmp/ipykernel_{number}/{hash(raw)}.py"
        shell.compile = Compiler()
        """
    program = [
        "from IPython.core.interactiveshell import InteractiveShell",
        "shell = InteractiveShell.instance(user_ns={'HOSTS': " + repr(hosts.hosts) + "})",
        *("\n".join(line.strip(" ") if not line.startswith(" " * 12) else line[8:] for line in kernel.splitlines()),),
        *(f"shell.run_cell({cell!r}, store_history=True).raise_error()" for cell in CELLS),
    ]
    if names == "terminal":
        del program[2]
    (tmp_path / "notebook.py").write_text("\n".join(program))
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=hosts.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("Traceback in the worker:")[1:]
    assert "  Cell In[3], line 2, in work\n    return helper(params)\n" in first
    assert "  Cell In[2], line 3, in helper\n    return 1 / x\n" in first
    assert "  Cell In[4], line 4, in __call__\n    return self.missing\n" in second
    assert "  Cell In[3], line 2, in work\n    return helper(params)\n" in third
    assert "  Cell In[7], line 2, in helper\n    return undefined\n" in third


def test_what_has_no_source_shows_its_name_and_line(tmp_path):
    source = """
from qjam import Master, TaskError
exec(compile("def work(params, part):\\n    return 1 / params", "made by hand", "exec"))
with Master(1) as master:
    try:
        master.run(work, 0)
    except TaskError as error:
        print(error.remote_traceback)
def stays(params, part): raise ValueError("here")
with Master(1) as master:
    try:
        master.run(stays, 0)
    except TaskError as error:
        print(error.remote_traceback)
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert 'File "made by hand", line 2, in work\n' in done.stdout
    assert 'File "<string>", line 9, in stays\n' in done.stdout


def test_a_module_of_which_a_closure_has_come_is_quoted_whole(script, tmp_path):
    (tmp_path / "makers.py").write_text(
        "def make(x):\n    def made(params, part):\n        return fails(x)\n    return made\n\n"
        "def fails(x):\n    return x[0]  # in the module\n\n"
        "def reads(params, part):\n    raise KeyError(1)  # by name\n"
    )
    source = """
        import makers
        from qjam import Master, TaskError
        with Master(HOSTS.replace("2", "1")) as master:
            for function in (makers.make(1), makers.reads, makers.make(2)):
                try:
                    master.run(function, None, [0])
                except TaskError as error:
                    print(error.remote_traceback)
        """
    printed = "\n".join(script(source))
    for line in ("        return fails(x)", "    return x[0]  # in the module", "    raise KeyError(1)  # by name"):
        assert line.strip() in printed, line
