"""Hosts with networks of their own, as Linux network namespaces: firewalled, cut off, or behind a jump host.

Each has one link, of two addresses, to this machine or to another namespace, and no way to anywhere else. Processes
and files are this machine's, so ends found by way of /proc or /tmp are no sign that the network would carry them.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from needs import lacking_programs, program

Incoming = Literal["open", "drop", "reject"]

# Set aside for tests of network devices (RFC 2544): neither the internet nor a private network uses it. There is a
# name for each of its subnets, so that who has the name has the subnet, whichever process asks.
NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
SUBNET_SIZE = 4  # network, this end, that end, broadcast
SUBNETS_TRIED = 20

LINK = "eth0"  # the host's end of its link

# What the firewall does with the first packet of a connection; the answer to one that came in is let out.
VERDICTS: dict[Incoming, str] = {"drop": "drop", "reject": "reject with tcp reset"}
FIREWALL = """
table inet firewall {{
    chain output {{
        type filter hook output priority filter
        ip daddr {master} tcp flags & (syn | ack) == syn {verdict}
    }}
}}
"""

BLACKHOLE = f"""
table inet blackhole {{
    chain input {{
        type filter hook input priority raw
        iifname "{LINK}" drop
    }}
    chain output {{
        type filter hook output priority raw
        oifname "{LINK}" drop
    }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """A host: what runs in it has this network and no other."""

    name: str  # as `ip netns` knows it
    master: str  # the address at the other end of its link: this machine, or the namespace it lies behind
    host: str  # its own address

    def command(self, *words: str) -> list[str]:
        """The command line that runs a program in it, with the same process id as if it ran here."""
        return [_program("ip"), "netns", "exec", self.name, *words]

    def cut(self) -> None:
        """Pulls the plug: the host has no route any more, and its peer soon hears that it is unreachable."""
        _ip("-n", self.name, "link", "set", LINK, "down")

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", LINK, "up")

    def blackhole(self) -> None:
        """Loses every packet, both ways, and tells nobody. The host still speaks with itself."""
        self._nft(BLACKHOLE)

    def unblackhole(self) -> None:
        self._nft("delete table inet blackhole")

    def _nft(self, rules: str) -> None:
        _run(self.command(_program("nft"), "-f", "-"), rules)


@functools.cache
def namespaces_work() -> str:
    """Gives "" or the reason why there can be no namespaces here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if lacks := lacking_programs("ip", "nft"):
        return lacks
    try:
        with namespace(incoming="reject"):
            return ""
    except RuntimeError as error:
        return f"no network namespaces here: {error}"


@contextmanager
def namespace(*, incoming: Incoming = "open") -> Iterator[Namespace]:
    """Makes a host that this machine reaches and that reaches this machine, and deletes it at the end.

    Args:
        incoming: what becomes of connections from the host to this machine: they are established, they hang
            ("drop"), or they are refused at once ("reject"). Those from here to the host always work.

    Raises:
        RuntimeError: the kernel refuses.
    """
    with _linked(None) as host:
        if incoming != "open":
            host._nft(FIREWALL.format(master=host.master, verdict=VERDICTS[incoming]))
        yield host


@contextmanager
def inner_namespace(outer: Namespace) -> Iterator[Namespace]:
    """Makes a host that reaches `outer` and is reached from it, and has no way from or to anywhere else."""
    with _linked(outer) as host:
        yield host


@contextmanager
def _linked(outer: Namespace | None) -> Iterator[Namespace]:
    at_near = ["-n", outer.name] if outer else []
    with ExitStack() as undo:
        name, subnet = _claimed_subnet()
        undo.callback(_ip, "netns", "del", name)
        near, far = subnet.hosts()
        if outer:
            # Else packets for it would leave this machine by its default route.
            _ip("route", "add", "unreachable", str(subnet))
            undo.callback(_ip, "route", "del", "unreachable", str(subnet))
        _ip(*at_near, "link", "add", name, "type", "veth", "peer", "name", LINK, "netns", name)
        # A namespace that is deleted takes its links along, but only some time later.
        undo.callback(_ip, *at_near, "link", "del", name)
        _ip(*at_near, batch=[f"address add {near}/30 dev {name}", f"link set {name} up"])
        _ip("-n", name, batch=["link set lo up", f"address add {far}/30 dev {LINK}", f"link set {LINK} up"])
        yield Namespace(name=name, master=str(near), host=str(far))


def _claimed_subnet() -> tuple[str, ipaddress.IPv4Network]:
    """Makes the namespace that stands for a subnet which nobody uses; gives its name too."""
    for _ in range(SUBNETS_TRIED):
        number = secrets.randbelow(NETWORK.num_addresses // SUBNET_SIZE)
        subnet = ipaddress.IPv4Network((int(NETWORK.network_address) + number * SUBNET_SIZE, 30))
        if any(subnet.overlaps(routed) for routed in _routed()):
            continue
        name = f"qjam-{number}"
        try:
            _ip("netns", "add", name)
        except RuntimeError as error:
            if "File exists" in str(error):
                continue
            raise
        return name, subnet
    raise RuntimeError(f"{SUBNETS_TRIED} subnets of {NETWORK} were all in use on this machine")


def _routed() -> list[ipaddress.IPv4Network]:
    """Where this machine has routes to, its own addresses included; not the default route."""
    routes = json.loads(_ip("-4", "-json", "route", "show", "table", "all") or "[]")
    return [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]


def _ip(*words: str, batch: Iterable[str] = ()) -> str:
    """Runs ip, or ip with several commands at once."""
    return _run([_program("ip"), *words, *(["-batch", "-"] if batch else [])], "\n".join(batch))


def _run(command: list[str], standard_input: str = "") -> str:
    done = subprocess.run(command, input=standard_input, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


def _program(name: str) -> str:
    return program(name) or name
