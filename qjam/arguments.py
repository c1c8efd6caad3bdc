"""Checks of arguments: a TypeError or ValueError names the argument and says what would be right."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from qjam_worker.ipc.cores import usable_cores

from .data.datasets import BaseDataSet
from .hosts import HostSpec, parse, resolve
from .launch.fleet import ROUTES, Options
from .remote_worker import RemoteWorker

HOST_KEYS = ("known", "accept-new")
MIN_BYTES = 1_000_000  # whoever writes a smaller limit meant another unit
KEEP_DATA = 20_000_000_000  # bytes per host for keep_data=True: the data sets of a few programs
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.ASCII | re.IGNORECASE)


def check_reduce(reduce: Any) -> None:
    """Check `reduce` of `run` and `submit`."""
    if reduce is not None and not callable(reduce):
        raise _wrong_type("reduce", "a function reduce(a, b), or None", reduce)


def check_order(call: str, params: Any) -> None:
    """Check that `params` of `run` and its like is no data set."""
    if isinstance(params, BaseDataSet):
        raise TypeError(
            f"params is a {type(params).__name__}: the order is {call}(module, params, dataset); without params write "
            f"{call}(module, None, dataset)"
        )


def items_of_map(function: Any, iterables: Sequence[Any], chunksize: Any) -> list[Any]:
    """Check the arguments of `map` and return what each call gets: an item, or of several iterables a tuple of them."""
    if not callable(function):
        raise TypeError(f"function must be callable, not {_short(function)}: the order is map(function, *iterables)")
    if not iterables:
        raise TypeError("map needs at least one iterable: the order is map(function, *iterables)")
    if chunksize is not None and (isinstance(chunksize, bool) or not isinstance(chunksize, (int, np.integer))):
        raise _wrong_type("chunksize", "an int of at least 1, or None", chunksize)
    if chunksize is not None and chunksize < 1:
        raise ValueError(f"chunksize must be an int of at least 1, or None, not {chunksize}")
    for iterable in iterables:
        if isinstance(iterable, BaseDataSet):
            raise TypeError(
                f"iterables: map calls function(item), and a {type(iterable).__name__} has slices: use "
                "collect(function, params, dataset), or pass the items themselves"
            )
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"iterables: {_short(iterable)} is not iterable: the order is map(function, *iterables)")
    return list(iterables[0]) if len(iterables) == 1 else list(zip(*iterables, strict=False))


def check_timeout(timeout: Any) -> None:
    """Check `timeout` of `run` and its like."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.number)):
        raise _wrong_type("timeout", "a number of seconds, or None", timeout)
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, or None for no limit, not {timeout!r}")


def check_min_workers(min_workers: Any, specs: list[HostSpec]) -> None:
    """Check `min_workers` of `Master` for these hosts."""
    if min_workers is None:
        return
    if isinstance(min_workers, bool) or not isinstance(min_workers, int):
        raise _wrong_type("min_workers", "an int or None", min_workers)
    counts = [spec.workers for spec in specs]
    total = None if None in counts else sum(count or 0 for count in counts)
    if min_workers < 1 or (total is not None and min_workers > total):
        raise ValueError(f"min_workers must be from 1 to {total or 'the number of workers'}, not {min_workers}")


def memory_limit_bytes(limit: Any) -> int | None:
    """Return `memory_limit` of `Master` in bytes, or None for no limit. Raises TypeError or ValueError.

    `limit`: None, a whole number of bytes, or a text with a unit: 1 MB is 1000 * 1000 bytes, 1 MiB is 1024 * 1024.
    """
    return None if limit is None else _bytes("memory_limit", limit, "None", "None for no limit")


def keep_data_bytes(keep: Any) -> int | None:
    """Return `keep_data` of `Master` in bytes, what a host may keep on disk: None for False, KEEP_DATA for True.

    `keep` is otherwise as for `memory_limit_bytes`.
    """
    if isinstance(keep, (bool, np.bool_)):
        return KEEP_DATA if keep else None
    return _bytes("keep_data", keep, "True or False", "False to keep nothing")


def _bytes(name: str, value: Any, others: str, instead: str) -> int:
    """Return the bytes that `value` means. Errors name the `others` that the argument may be, and what to pass
    `instead` of a small number.
    """
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        if found is None:
            raise ValueError(f'{name} must be a number of bytes or a text such as "500MB" or "2GiB", not {value!r}')
        number, unit, binary = found.groups()
        size = int(Decimal(number) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit.lower()) if unit else 0))
    elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise _wrong_type(name, f'a whole number of bytes, a text such as "500MB", or {others}', value)
    else:
        size = int(value)
    if size < MIN_BYTES:
        raise ValueError(f'{name} must be at least {MIN_BYTES:,} bytes ("1MB"), or {instead}, not {value!r}')
    return size


def check_speculation(speculation: Any) -> None:
    """Check `speculation` of `Master`."""
    if not isinstance(speculation, bool):
        raise _wrong_type("speculation", "True or False", speculation)


def ship(names: Any) -> tuple[str, ...]:
    """Return `ship` of `Master`, names of packages. Raises TypeError."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise _wrong_type("ship", 'a list of names of packages, as ["mypkg"]', names)
    return tuple(names)


def specs(hosts: Any) -> list[HostSpec]:
    """Return the hosts that `hosts` of `Master` names. Raises TypeError or ValueError."""
    if isinstance(hosts, RemoteWorker):
        hosts = hosts.spec
    elif isinstance(hosts, (list, tuple)):
        hosts = [item.spec if isinstance(item, RemoteWorker) else item for item in hosts]
    return resolve(hosts)


def counted(specs: list[HostSpec]) -> list[HostSpec]:
    """Return the specs, with this machine's number of workers where it is left open."""
    return [replace(spec, workers=usable_cores()) if spec.local and spec.workers is None else spec for spec in specs]


def check_new_hosts(specs: list[HostSpec], known: list[str]) -> None:
    """Check that the hosts passed to `add_hosts` are new."""
    for spec in specs:
        if spec.address in known:
            raise ValueError(f"hosts: {spec.address!r} is already a host of this Master; remove it first")


def hosts_to_remove(specs: list[HostSpec], known: list[str]) -> list[str]:
    """Return the names of the hosts that `remove_hosts` is to remove. Raises ValueError if one is unknown or none would
    be left.
    """
    wanted = [spec.address for spec in specs]
    for name in wanted:
        if name not in known:
            raise ValueError(f"hosts: {name!r} is not a host of this Master; those are {', '.join(known)}")
    if len(wanted) == len(known):
        raise ValueError("hosts: no host would be left; use close() to end the Master")
    return wanted


def options(
    host_keys: Any, ssh_config: Any, route: Any, address: Any, memory_limit: int | None, keep_data: int | None
) -> Options:
    """Check the arguments of `Master` that are about ssh hosts, and return them as Options."""
    if host_keys not in HOST_KEYS:
        raise ValueError(f"host_keys must be {' or '.join(map(repr, HOST_KEYS))}, not {host_keys!r}")
    if route is not None and route not in ROUTES:
        raise ValueError(f"route must be None or one of {', '.join(map(repr, ROUTES))}, not {route!r}")
    if ssh_config is not None:
        if not isinstance(ssh_config, (str, os.PathLike)):
            raise _wrong_type("ssh_config", "a path or None", ssh_config)
        ssh_config = Path(ssh_config).expanduser()
        if not ssh_config.is_file():
            raise ValueError(f"ssh_config: there is no file {ssh_config}")
    addresses = [_address(item) for item in ([address] if isinstance(address, str) else address)]
    return Options(ssh_config, host_keys == "accept-new", route, addresses, memory_limit, keep_data)


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _wrong_type(name: str, wanted: str, value: Any) -> TypeError:
    return TypeError(f"{name} must be {wanted}, not {value!r} ({type(value).__name__})")


def _address(item: Any) -> str:
    try:
        spec = parse(item)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"address must be a name or an address of this machine, with or without :port, not {item!r}"
        ) from error
    if spec.user is not None or spec.workers != 1:
        raise ValueError(f"address must have no user and no workers, not {item!r}")
    return spec.address
