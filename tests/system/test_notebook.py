"""Notebooks: functions of cells in a real kernel, and the button that interrupts one."""

from __future__ import annotations

import re

from notebook import INTERRUPT, shown

ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def test_an_executor_in_a_notebook(tmp_path):
    cells = {
        "start": "from qjam import Executor\nexecutor = Executor(2)",
        "define": "def square(x):\n    return x * x",
        "map": "list(executor.map(square, range(4)))",
        "define again": "def square(x):\n    return -x * x",
        "map again": "list(executor.map(square, range(4)))",
        "class": "class Point:\n    def __init__(self, x): self.x = x\n"
        "type(executor.submit(Point, 3).result()) is Point",
        "await": "import asyncio\nawait asyncio.wrap_future(executor.submit(square, 3))",
        "fail": "def fail():\n    return 1 / 0\nexecutor.submit(fail).result()",
        "interrupt a call": f"import time\nfuture = executor.submit(time.sleep, 100)\nprint({INTERRUPT!r})\n"
        "future.result()",
        "afterwards": "executor.submit(square, 5).result(), future.cancel(), future.cancelled()",
        "interrupt map": f"print({INTERRUPT!r})\nlist(executor.map(time.sleep, [100] * 10))",
        "after map": "list(executor.map(square, range(3)))",
        "joblib": "import qjam.joblib\nfrom joblib import Parallel, delayed\nqjam.joblib.register()\n"
        "Parallel(2, backend='qjam')(delayed(square)(i) for i in range(4))",
        "pool": "from qjam import Pool\nwith Pool(1) as pool:\n    print(pool.map(lambda x: square(x) + 1, range(3)))",
        "end": "executor.shutdown(); qjam.joblib.shutdown()",
    }
    results = dict(zip(cells, (ESCAPES.sub("", text) for text in shown(list(cells.values()), tmp_path))))
    assert results["map"] == "[0, 1, 4, 9]"
    assert results["map again"] == "[0, -1, -4, -9]"
    assert results["class"] == "True"
    assert results["await"] == "-9"
    assert "ZeroDivisionError: division by zero" in results["fail"]
    assert "Cell In[8], line 2, in fail\n    return 1 / 0" in results["fail"]
    for name in ("interrupt a call", "interrupt map"):
        assert results[name].splitlines()[-1].startswith("KeyboardInterrupt")
    assert results["afterwards"] == "(-25, True, True)"
    assert results["after map"] == "[0, -1, -4]"
    assert results["joblib"] == "[0, -1, -4, -9]"
    assert results["pool"] == "[1, 0, -3]"
    assert {results[name] for name in ("start", "define", "define again", "end")} == {""}
