"""What may be written as hosts, what it means, and what is said about anything else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam.hosts import HostSpec, parse, resolve

AUTO = None


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("node1", HostSpec("node1", None, None, 1)),
        ("node1*8", HostSpec("node1", None, None, 8)),
        ("node1*auto", HostSpec("node1", None, None, AUTO)),
        ("alice@node1:2222*8", HostSpec("node1", "alice", 2222, 8)),
        ("10.0.0.7:22", HostSpec("10.0.0.7", None, 22, 1)),
        ("[::1]:22", HostSpec("::1", None, 22, 1)),
        ("root@[fe80::1%eth0]*2", HostSpec("fe80::1%eth0", "root", None, 2)),
        ("me@corp@node_1.example", HostSpec("node_1.example", "me@corp", None, 1)),
        ("local*4", HostSpec("local", None, None, 4)),
        ("localhost", HostSpec("localhost", None, None, 1)),
    ],
)
def test_a_host_is_user_host_port_and_workers(text: str, spec: HostSpec) -> None:
    assert parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(("text", "address"), [("a*3", "a"), ("u@a:22*3", "u@a:22"), ("u@[::1]:22*auto", "u@[::1]:22")])
def test_the_address_is_the_host_without_its_workers(text: str, address: str) -> None:
    assert parse(text).address == address


def test_only_the_name_local_is_this_machine_without_ssh() -> None:
    assert parse("local*2").local
    assert not parse("localhost").local


def test_none_is_one_worker_a_usable_core_of_this_machine() -> None:
    assert resolve(None) == [HostSpec("local", workers=AUTO)]


def test_a_number_is_that_many_workers_on_this_machine() -> None:
    assert resolve(4) == [HostSpec("local", workers=4)]


@pytest.mark.parametrize(
    "written", ["a*2 b", "a*2,b", " a*2 ,\n b ", ["a*2", "b"], ("a", "a b"), iter(["a", "b", "a"])]
)
def test_hosts_are_a_text_with_spaces_or_commas_or_any_iterable(written: Any) -> None:
    assert resolve(written) == [HostSpec("a", workers=2), HostSpec("b")]


def test_a_host_spec_is_taken_as_it_is() -> None:
    assert resolve(HostSpec("a", workers=3)) == [HostSpec("a", workers=3)]
    assert resolve([HostSpec("a", workers=3), "a"]) == [HostSpec("a", workers=4)]


def test_the_workers_of_a_host_named_again_add_up_at_its_first_place() -> None:
    assert resolve(["a", "b", "a*4"]) == [HostSpec("a", workers=5), HostSpec("b")]
    assert resolve(["local", "local"]) == [HostSpec("local", workers=2)]


def test_another_user_or_port_is_another_host() -> None:
    assert [spec.address for spec in resolve("a u@a a:22 u@a:22 a")] == ["a", "u@a", "a:22", "u@a:22"]


@pytest.mark.parametrize("written", ["a*auto a", "a a*auto", "a*auto a*auto"])
def test_auto_cannot_be_added_to(written: str) -> None:
    with pytest.raises(ValueError, match=r"hosts: 'a' is named more than once.*'a\*auto' once"):
        resolve(written)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a*0", r"'a\*0'.*at least 1, or auto"),
        ("a*-1", r"'a\*-1'.*at least 1, or auto"),
        (0, r"'local\*0'.*at least 1"),
        (-3, r"'local\*-3'.*at least 1"),
        ("a:0", "'a:0'.*from 1 to 65535"),
        ("a:65536", "'a:65536'.*from 1 to 65535"),
        ("a:ssh", "'a:ssh' is not a host: write"),
        ("a*", r"'a\*' is not a host: write"),
        ("a*two", r"'a\*two' is not a host: write"),
        ("a*2*3", "is not a host: write"),
        ("a * 4", r"'\*' is not a host: write"),
        ("@a", "is not a host: write"),
        ("a@", "is not a host: write"),
        ("::1", r"is not a host: write .*\[::1\]"),
        ("[a]", "is not a host: write"),
        ("ssh://a", "is not a host: write"),
        ("-oProxyCommand=x", "is not a host: write"),
        ("-l@a", "is not a host: write"),
        ("a\0b", "is not a host: write"),
        ("local:22", "'local:22'.*without ssh.*'localhost'"),
        ("me@local", "'me@local'.*without ssh.*'localhost'"),
        ("", "no host is named"),
        (" , ", "no host is named"),
        ([], "no host is named"),
    ],
)
def test_what_cannot_be_a_host_is_a_value_error_that_names_it(written: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^hosts: .*{said}"):
        resolve(written)


@pytest.mark.parametrize("written", [True, 2.0, b"a", {"a": 4}, object, ["a", 4], [None], [["a"]]])
def test_what_is_no_text_is_a_type_error_that_says_what_is_accepted(written: Any) -> None:
    with pytest.raises(TypeError, match=r"^hosts.*\[user@\]host\[:port\]\[\*workers\]"):
        resolve(written)


@pytest.mark.parametrize(
    "fields",
    [
        {"host": 4},
        {"host": "a", "user": 4},
        {"host": "a", "port": "22"},
        {"host": "a", "port": True},
        {"host": "a", "workers": 2.0},
        {"host": "a", "workers": True},
    ],
)
def test_a_host_spec_of_other_types_is_a_type_error(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^hosts: "):
        HostSpec(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"host": ""},
        {"host": "u@a"},
        {"host": "a:22"},
        {"host": "a*2"},
        {"host": "[::1]"},
        {"host": "-v"},
        {"host": "a", "user": "-v"},
        {"host": "a", "user": ""},
        {"host": "a", "port": 0},
        {"host": "a", "workers": 0},
        {"host": "local", "port": 22},
    ],
)
def test_a_host_spec_that_no_text_could_make_is_a_value_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^hosts: "):
        HostSpec(**fields)


NAMES = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,8}", fullmatch=True).filter(
    lambda name: name != "local" and not name.isdecimal()
)
SPECS = st.builds(
    HostSpec,
    host=NAMES | st.ip_addresses(v=6).map(str),
    user=st.none() | NAMES,
    port=st.none() | st.integers(1, 65535),
    workers=st.none() | st.integers(1, 999),
)


@given(SPECS)
def test_every_host_spec_is_made_again_from_its_text(spec: HostSpec) -> None:
    assert parse(str(spec)) == spec
    assert resolve(str(spec)) == [spec]


def test_a_number_in_a_text_is_not_taken_for_the_name_of_a_host() -> None:
    for named in ("4", "local 4", ["4"]):
        with pytest.raises(ValueError, match=r"hosts: '4' is a number, not a host.*'local\*4'"):
            resolve(named)


@given(st.text())
def test_any_text_is_a_host_or_a_value_error(text: str) -> None:
    try:
        spec = parse(text)
    except ValueError:
        return
    assert parse(str(spec)) == spec


@given(st.lists(st.tuples(NAMES, st.integers(1, 5)), min_size=1))
def test_no_worker_is_lost_or_added_when_hosts_are_merged(pairs: list[tuple[str, int]]) -> None:
    merged = resolve([f"{name}*{workers}" for name, workers in pairs])
    assert [spec.host for spec in merged] == list(dict.fromkeys(name for name, _ in pairs))
    for spec in merged:
        assert spec.workers == sum(workers for name, workers in pairs if name == spec.host)
