"""The data that hosts keep: for as long as the program holds it, and for a while what nobody holds any more.

Nobody holds a list that is passed to `run` as it is, a slice of an array, or a data set that is made anew for each
round: the next round may well have the same. So such data goes when it has not been used for GRACE seconds, or earlier
if there is too much of it.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from qjam.data.file_slices import InFile
from qjam.data.leases import Lease

from .data import Data
from .timers import Timers

# What nobody holds: it is kept so many seconds, so many data sets of it, and so many bytes beside the last one.
GRACE = 5.0
MOST = 16
MOST_BYTES = 256 * 1024 * 1024


class Holdings:
    """All data that nodes know of. Methods that give data have dropped it: the nodes are to be told."""

    def __init__(self) -> None:
        self.timers: Timers[int] = Timers()
        self._numbers = count(1)
        self._data: dict[tuple[str, ...], Data] = {}
        self._unheld: OrderedDict[int, Data] = OrderedDict()  # least recently used first
        self._once = Data(0, 0)

    def __len__(self) -> int:
        return len(self._data)

    def once(self, nslices: int) -> Data:
        """In place of data, for what runs once on each of so many workers."""
        if self._once.nslices != nslices:
            self._once = Data(0, nslices)
        return self._once

    def begin(self, lease: Lease, file: InFile | None = None) -> Data:
        """The data of a lease, for a round that begins. `file`: where the holder of the lease has it."""
        data = self._data.get(lease.key)
        if data is None:
            data = self._data[lease.key] = Data(next(self._numbers), len(lease.key), lease.key, lease.nbytes)
        data.file = data.file or file
        data.rounds += 1
        if lease.held and lease not in data.leases:
            data.leases.append(lease)
            data.at_once = False
        if self._unheld.pop(data.number, None) is not None:
            self.timers.drop(data.number)
        return data

    def end(self, data: Data, now: float) -> list[Data]:
        """A round with this data has ended."""
        if not data.refs:
            return []
        data.rounds -= 1
        return self._settle(data, now)

    def let_go(self, lease: Lease, at_once: bool, now: float) -> list[Data]:
        """A lease is not held any more."""
        data = self._data.get(lease.key)
        if data is None:
            return []
        data.at_once = data.at_once or at_once
        return self._settle(data, now)

    def due(self, now: float) -> list[Data]:
        """The data that nobody has used for long enough."""
        return [self._drop(self._unheld[number]) for number in self.timers.due(now)]

    def lose(self, name: str) -> None:
        """This node is gone."""
        for data in self._data.values():
            data.told.pop(name, None)

    def _settle(self, data: Data, now: float) -> list[Data]:
        data.leases = [lease for lease in data.leases if lease.held]
        if data.rounds or data.leases:
            return []
        if data.at_once:
            return [self._drop(data)]
        self._unheld[data.number] = data
        self._unheld.move_to_end(data.number)
        self.timers.set(data.number, now + GRACE)
        before = sum(other.nbytes for other in self._unheld.values()) - data.nbytes
        dropped = []
        while len(self._unheld) > MOST or before > MOST_BYTES:
            dropped.append(self._drop(next(iter(self._unheld.values()))))
            before -= dropped[-1].nbytes
        return dropped

    def _drop(self, data: Data) -> Data:
        del self._data[data.refs]
        self._unheld.pop(data.number, None)
        self.timers.drop(data.number)
        return data
