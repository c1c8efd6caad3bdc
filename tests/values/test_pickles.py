"""Pickles tell the versions of the packages that they name."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from qjam_worker.values import pickles


class Fails:
    """Cannot be loaded again, and names numpy."""

    def __reduce__(self):
        return _fail, (np.dtype("f8"),)


def _fail(_value):
    raise ValueError("not like this")


def packed(value, monkeypatch, version):
    monkeypatch.setattr(np, "__version__", version)
    data = pickles.with_versions(pickle.dumps(value, protocol=5))
    monkeypatch.undo()
    return data


@pytest.mark.parametrize("own", [False, True])
def test_a_failure_names_versions_that_differ(monkeypatch, own):
    data = packed(Fails(), monkeypatch, "0.9")
    with pytest.raises(
        ImportError, match=rf"ValueError: not like this \(numpy is 0\.9 where .* and {np.__version__} here"
    ):
        pickles.loads(data, own=own)


def test_a_failure_with_the_same_versions_is_itself(monkeypatch):
    for data in (packed(Fails(), monkeypatch, np.__version__), pickle.dumps(Fails(), protocol=5), b"\x80\x05", b""):
        with pytest.raises((ValueError, EOFError, pickle.UnpicklingError)):
            pickles.loads(data)


def test_other_versions_do_no_harm_where_loading_works(monkeypatch):
    assert (pickles.loads(packed(np.arange(3), monkeypatch, "0.9")) == np.arange(3)).all()


def test_what_names_no_package_has_no_versions():
    assert pickles.with_versions(b"\x80\x05N.") == b"\x80\x05N.\x00\x00"


def test_equal_values_have_equal_bytes_whatever_is_loaded(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", np)
    assert pickles.with_versions(pickle.dumps({"a": 1})) == pickle.dumps({"a": 1}) + b"\x00\x00"
