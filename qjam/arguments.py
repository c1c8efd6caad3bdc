"""Whether what a caller passes can be meant: a TypeError or ValueError names the argument and what would be right."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from .hosts import HostSpec, parse
from .launch.fleet import ROUTES, Options

HOST_KEYS = ("known", "accept-new")
MIN_BYTES = 1_000_000  # a smaller limit was meant in another unit, and nothing could be done with it
KEEP_DATA = 20_000_000_000  # bytes that keep_data=True keeps: data sets of a few programs, on disks of today
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.ASCII | re.IGNORECASE)


def check_timeout(timeout: Any) -> None:
    """Of `run` and `submit`."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.number)):
        raise TypeError(f"timeout must be a number of seconds, or None, not {timeout!r} ({type(timeout).__name__})")
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, or None for no limit, not {timeout!r}")


def check_min_workers(min_workers: Any, specs: list[HostSpec]) -> None:
    """Of `Master`, for these hosts."""
    if min_workers is None:
        return
    if isinstance(min_workers, bool) or not isinstance(min_workers, int):
        raise TypeError(f"min_workers must be an int or None, not {min_workers!r} ({type(min_workers).__name__})")
    asked = [spec.workers for spec in specs]
    most = None if None in asked else sum(workers or 0 for workers in asked)
    if min_workers < 1 or (most is not None and min_workers > most):
        raise ValueError(f"min_workers must be from 1 to {most or 'the number of workers'}, not {min_workers}")


def memory_limit_bytes(limit: Any) -> int | None:
    """The `memory_limit` of `Master` in bytes: those that user code in one worker process may take for itself.

    None for no limit, a whole number, or a text with a unit: "500MB" and "1.5 GB" count in thousands, "1GiB" in 1024s.
    """
    return None if limit is None else _bytes("memory_limit", limit, "None", "None for no limit")


def keep_data_bytes(keep: Any) -> int | None:
    """The `keep_data` of `Master` in bytes: those that a host may keep on disk. None for False, as above for the rest,
    KEEP_DATA for True.
    """
    if isinstance(keep, (bool, np.bool_)):
        return KEEP_DATA if keep else None
    return _bytes("keep_data", keep, "True or False", "False to keep nothing")


def _bytes(name: str, value: Any, others: str, instead: str) -> int:
    """The bytes that an argument means, which may also be one of the `others`."""
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        if found is None:
            raise ValueError(f'{name} must be a number of bytes or a text as "500MB" or "2GiB", not {value!r}')
        number, unit, binary = found.groups()
        size = int(Decimal(number) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit.lower()) if unit else 0))
    elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f'{name} must be a whole number of bytes, a text as "500MB", or {others}, '
            f"not {value!r} ({type(value).__name__})"
        )
    else:
        size = int(value)
    if size < MIN_BYTES:
        raise ValueError(f'{name} must be at least {MIN_BYTES:,} bytes ("1MB"), or {instead}, not {value!r}')
    return size


def check_speculation(speculation: Any) -> None:
    """Of `Master`."""
    if not isinstance(speculation, bool):
        raise TypeError(f"speculation must be True or False, not {speculation!r} ({type(speculation).__name__})")


def check_new_hosts(specs: list[HostSpec], known: list[str]) -> None:
    """Of `add_hosts`."""
    for spec in specs:
        if spec.address in known:
            raise ValueError(f"hosts: {spec.address!r} is a host of this Master already; remove it first")


def hosts_to_remove(specs: list[HostSpec], known: list[str]) -> list[str]:
    """Of `remove_hosts`: the names of those that are meant."""
    wanted = [spec.address for spec in specs]
    for name in wanted:
        if name not in known:
            raise ValueError(f"hosts: {name!r} is not a host of this Master; those are {', '.join(known)}")
    if len(wanted) == len(known):
        raise ValueError("hosts: none would be left; close() ends the Master")
    return wanted


def options(
    host_keys: Any, ssh_config: Any, route: Any, address: Any, memory_limit: int | None, keep_data: int | None
) -> Options:
    """The options of `Master` for hosts that are reached by ssh."""
    if host_keys not in HOST_KEYS:
        raise ValueError(f"host_keys must be {' or '.join(map(repr, HOST_KEYS))}, not {host_keys!r}")
    if route is not None and route not in ROUTES:
        raise ValueError(f"route must be None or one of {', '.join(map(repr, ROUTES))}, not {route!r}")
    if ssh_config is not None:
        if not isinstance(ssh_config, (str, os.PathLike)):
            raise TypeError(f"ssh_config must be a path or None, not {ssh_config!r} ({type(ssh_config).__name__})")
        ssh_config = Path(ssh_config).expanduser()
        if not ssh_config.is_file():
            raise ValueError(f"ssh_config: there is no file {ssh_config}")
    addresses = [_address(item) for item in ([address] if isinstance(address, str) else address)]
    return Options(ssh_config, host_keys == "accept-new", route, addresses, memory_limit, keep_data)


def _address(item: Any) -> str:
    try:
        spec = parse(item)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"address must be a name or an address of this machine, with :port or not, not {item!r}"
        ) from error
    if spec.user is not None or spec.workers != 1:
        raise ValueError(f"address must have no user and no workers, not {item!r}")
    return spec.address
