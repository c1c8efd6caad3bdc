"""Calls of functions in the workers, many at a time: what `Executor`, `Pool` and the joblib back-end are made of."""

from .caller import Caller
from .center import Center
from .future import CallFuture, CallLost, RemoteTraceback

__all__ = ["CallFuture", "CallLost", "Caller", "Center", "RemoteTraceback"]
