"""Whether what a caller passes can be meant: a TypeError or ValueError names the argument and what would be right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .hosts import HostSpec, parse
from .launch.fleet import ROUTES, Options

HOST_KEYS = ("known", "accept-new")


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
    """The `memory_limit` of `Master` in bytes."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"memory_limit must be a number of bytes or None, not {limit!r} ({type(limit).__name__})")
    if limit <= 0:
        raise ValueError(f"memory_limit must be a positive number of bytes, or None for no limit, not {limit!r}")
    return limit


def options(host_keys: Any, ssh_config: Any, route: Any, address: Any, memory_limit: int | None) -> Options:
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
    return Options(ssh_config, host_keys == "accept-new", route, addresses, memory_limit)


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
