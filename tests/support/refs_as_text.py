"""Refs as short texts: `d0-1` for a slice, `code:x`, `params:1` and `module:1:name` for the rest."""

from __future__ import annotations

from collections.abc import Iterable

from qjam_worker.wire.refs import KINDS, SLICE, Ref


def ref(text: str) -> Ref:
    kind, colon, key = text.partition(":")
    return Ref(kind, key) if colon and kind in KINDS else Ref(SLICE, text)


def refs(texts: Iterable[str]) -> list[Ref]:
    return [ref(text) for text in texts]


def text(of: Iterable[str]) -> str:
    kind, key = of
    return key if kind == SLICE else f"{kind}:{key}"
