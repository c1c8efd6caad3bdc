"""Values that a host cannot load because a package is older there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qjam import DataSet, HostSpec, Master, TaskError
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import write_config

SERIES = pd.Series(["a", "b"])


@pytest.fixture
def master(tmp_path, ssh_host):
    """A master with a host that has a pandas of long ago."""
    package = tmp_path / "old" / "pandas"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.1'\n")
    config = write_config(tmp_path / "config", [ssh_host("away")])
    with Master(HostSpec("away", env={"PYTHONPATH": str(package.parent)}), ssh_config=config) as master:
        yield master


@pytest.mark.parametrize("way", ["params", "slice", "closure", "params of a class of the caller's"])
def test_the_error_names_both_versions(master, way):
    def length(params, part):
        return len(params)

    class Holder:
        def __init__(self, value):
            self.value = value

        def __len__(self):
            return len(SERIES)

    ways = {
        "params": lambda: master.run(length, SERIES, [0]),
        "slice": lambda: master.run(length, [], DataSet([SERIES], slice_size=1)),
        "closure": lambda: master.run(lambda params, part: len(SERIES), None, [0]),
        "params of a class of the caller's": lambda: master.run(length, Holder(SERIES), [0]),
    }
    with pytest.raises(TaskError, match=rf"pandas is {pd.__version__} where this was pickled, and 0\.1 here") as caught:
        ways[way]()
    assert caught.value.what.count("pickled") == 1
    assert isinstance(caught.value.__cause__, ImportError)
    assert master.run(length, np.arange(3), [0]) == 3


def test_a_package_that_is_not_there_is_named_as_before(tmp_path, ssh_host):
    config = write_config(tmp_path / "config", [ssh_host("away")])
    with Master("away", ssh_config=config) as master:
        for call in (
            lambda: master.run(lambda params, part: len(params), SERIES, [0]),
            lambda: master.run(lambda params, part: len(SERIES), None, [0]),
        ):
            with pytest.raises(TaskError, match=r"No module named 'pandas'.*installed here and not on that host"):
                call()
