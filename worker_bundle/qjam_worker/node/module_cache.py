"""Modules of the user's project that a node has fetched for its workers."""

from __future__ import annotations

from typing import Optional

from qjam_worker.wire.refs import Ref, module_name, of_module
from qjam_worker.worker.user_modules import FIELDS, Shipped

from .worker_handle import WorkerHandle

Module = Optional[Shipped]

MAX_NAME = 1000  # characters; no file of a module has a longer name


class ModuleCache:
    """The modules of the newest epoch, and the workers that wait for one. It knows which modules are absent, so that
    the node asks the master for each name once.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._known: dict[Ref, Module] = {}
        self._waiting: dict[Ref, list[WorkerHandle]] = {}

    def __contains__(self, ref: Ref) -> bool:
        """Whether a worker waits for this ref."""
        return ref in self._waiting

    def begin(self, epoch: int) -> None:
        """A job of this epoch begins: the modules of another epoch are out of date."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._known.clear()

    def ask(self, worker: WorkerHandle, epoch: int, name: str) -> Optional[Ref]:
        """Reply to the worker, or give the ref that the node has to fetch first."""
        ref = of_module(epoch, name)
        if ref in self._known or len(name) > MAX_NAME:
            self._answer(worker, ref, self._known.get(ref))
            return None
        self._waiting.setdefault(ref, []).append(worker)
        return ref

    def arrived(self, ref: Ref, module: Module) -> None:
        """The master has sent a module, or None. ValueError if it is neither."""
        fields = {name: type(value) for name, value in module.items()} if type(module) is dict else None
        if module is not None and fields != FIELDS:
            raise ValueError(f"{ref} is no module")
        self._known[ref] = module
        self.refuse(ref, module)

    def refuse(self, ref: Ref, module: Module = None) -> None:
        """Reply to the waiting workers; None if the module is absent."""
        for worker in self._waiting.pop(ref, []):
            self._answer(worker, ref, module)

    def forget(self, worker: WorkerHandle) -> None:
        """The worker process has ended and waits no longer."""
        for waiting in self._waiting.values():
            while worker in waiting:
                waiting.remove(worker)

    def _answer(self, worker: WorkerHandle, ref: Ref, module: Module) -> None:
        if worker.modules is not None:
            worker.modules.send({"name": module_name(ref), "module": module})
