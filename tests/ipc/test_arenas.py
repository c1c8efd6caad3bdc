"""Arenas: no two live pieces at one place, and nothing is left when all is freed."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjam_worker.ipc import arenas as module
from qjam_worker.ipc.arenas import ARENA, MAX_SPARE, Arenas, MappedArenas, arena_name
from qjam_worker.ipc.files import Files, Mapped, NoRoom


class FakeFiles:
    """Files in memory."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}
        self.room = True

    def create(self, name: str, size: int) -> Mapped:
        if not self.room:
            raise NoRoom("full")
        assert name not in self.data
        self.data[name] = bytearray(size)
        return Mapped(name, memoryview(self.data[name]))


SIZES = st.integers(0, 300) | st.integers(0, ARENA // 4) | st.sampled_from([ARENA // 4, ARENA // 4 + 1, 2 * ARENA])
STEPS = st.lists(st.tuples(SIZES, st.integers(1, 3), st.integers(0, 3)), max_size=30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_what_lives_keeps_its_bytes_and_all_is_freed(steps: list[tuple[int, int, int]]) -> None:
    files = FakeFiles()
    arenas = Arenas(files)  # type: ignore[arg-type]
    before, module.remove = module.remove, lambda path: files.data.__delitem__(path)
    try:
        live: list[tuple[int, int, bytes]] = []
        for number, (size, users, frees) in enumerate(steps, start=1):
            data = bytes([number]) * size
            arena, offset = arenas.put(data, users)
            live += [(arena, offset, data)] * users
            for _ in range(min(frees, len(live))):
                arenas.free(live.pop(number * 7919 % len(live))[0])
            for arena, offset, data in live:
                assert files.data[arena_name(arena)][offset : offset + len(data)] == data
        for arena, _, _ in live:
            arenas.free(arena)
        assert len(arenas) == len(files.data) <= MAX_SPARE + 1
        assert all(len(file) == ARENA for file in files.data.values())
    finally:
        module.remove = before


def test_no_room_changes_nothing() -> None:
    files = FakeFiles()
    arenas = Arenas(files)  # type: ignore[arg-type]
    arena, offset = arenas.put(b"one")
    files.room = False
    with pytest.raises(NoRoom):
        arenas.put(bytes(ARENA))
    assert arenas.put(b"two") == (arena, offset + 8)
    assert len(arenas) == 1


def test_a_worker_reads_what_the_node_has_put() -> None:
    files = Files.make()
    try:
        arenas, mapped = Arenas(files), MappedArenas(files)
        places = [(data, *arenas.put(data)) for data in (b"one", bytes(2 * ARENA), b"two")]
        for data, arena, offset in places:
            assert mapped.read(arena, offset, len(data)) == data
        for _, arena, _ in places:
            arenas.free(arena)
        assert [name for name in os.listdir(files.directories[0]) if name.startswith("arena")] == [arena_name(1)]
        arenas.clear()
    finally:
        files.remove()
