"""Who may connect: public keys of CURVE, each with the only name under which its owner is heard (RFC 27 of ZeroMQ).

No sockets: whoever has a ROUTER asks this for each request that its ZAP handler gets.
"""

from __future__ import annotations

ZAP_DOMAIN = b"qjam"
KEY = 32  # bytes of a CURVE key


class Admission:
    """The keys that may connect. `admit` and `dismiss` may be called in any thread."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def admit(self, name: str, key: bytes) -> None:
        """The owner of this public key may connect as `name` and under no other name."""
        self._names[key] = name

    def dismiss(self, name: str) -> None:
        """Refuse `name` from now on."""
        for key in [key for key, known in list(self._names.items()) if known == name]:
            del self._names[key]

    def verdict(self, request: list[bytes]) -> list[bytes]:
        """The answer to a request of ZAP. Whatever is wrong with that, nobody is let in."""
        # version, request id, domain, address, identity, mechanism, credentials
        version, number, *_ = [*request, b"", b""]
        name = None
        if len(request) == 7 and version == b"1.0" and request[2] == ZAP_DOMAIN and request[5] == b"CURVE":
            name = self._names.get(request[6]) if len(request[6]) == KEY else None
        if name is None:
            return [b"1.0", number, b"400", b"unknown key", b"", b""]
        return [b"1.0", number, b"200", b"OK", name.encode(), b""]
