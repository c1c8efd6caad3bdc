"""What runs first on a host: tells what is there, takes what lacks, finds the way back, becomes the node.

The source of this file is sent to `python3 -c` through stdin, so it needs the standard library alone, and imports what
it needs when it needs it: its start is part of every start. It must also be understood by a python that is too old for
it, in order to say so. Messages are lines of JSON both ways; the parts follow their line as bare bytes.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import BufferedReader, BytesIO
    from typing import Any, Dict, List, Optional, Tuple  # noqa: F401  in comments too


OLDEST = (3, 9)
PREFIX = "/qjam-"  # of directories outside the home; the user's number follows
KEEP_DAYS, KEEP_PARTS = 30, 16  # parts that no node uses go when they are older, or when there are more
MAKING, ABANDONED_DAYS = "making-", 1  # parts that are being unpacked; this old they are what a killed start has left
PACKAGES = (
    ("numpy", "numpy/__init__.py"),
    ("pyzmq", "zmq/__init__.py"),
    ("msgpack", "msgpack/__init__.py"),
    ("msgpack-numpy", "msgpack_numpy.py"),
    ("cloudpickle", "cloudpickle/__init__.py"),
)
GREETING = 64  # bytes of ZMTP's greeting: the first is FF, the tenth 7F


class Failed(Exception):
    """The start cannot go on; the text is for the user."""


class Gone(Exception):
    """The master is no more."""


class Stage1:
    """`read` is a buffered stdin, `write` the descriptor of what was stdout: nothing else may write there."""

    def __init__(self, read: "BufferedReader", write: int) -> None:
        self.read = read
        self.write = write
        self.locks = []  # type: List[int]

    def tell(self, **message: "Any") -> None:
        import json  # not above: before `main` begins, it might be a json.py that lies where the login begins

        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.write, data) :]

    def hear(self) -> "Any":
        import json

        line = self.read.readline()
        if not line:
            raise Gone
        return json.loads(line)

    def run(self) -> None:
        hello = self.hear()
        os.write(self.write, hello["marker"].encode() + b"\n")  # what a shell has printed stands before it
        if sys.version_info < OLDEST:
            version = ".".join(map(str, sys.version_info[:3]))
            raise Failed("%s is python %s; qjam needs %d.%d or newer on a host" % (sys.executable, version, *OLDEST))
        os.environ.update(hello["env"])
        if not sys.flags.ignore_environment:
            sys.path[:0] = filter(None, hello["env"].get("PYTHONPATH", "").split(os.pathsep))
        caches = Caches()
        self.tell(facts=facts(), cached=caches.held(), python=sys.executable, process=process())
        probes = Probes(hello["ways"])  # their time runs while the parts come
        wanted = self.hear()
        kept = [caches.use(part) for part in wanted["parts"]]
        paths = [path or self.receive(part, caches) for path, part in zip(kept, wanted["parts"])]
        self.locks = [lock for path in paths for lock in caches.lock(path)]
        sys.path[:0] = paths
        warm = warm_parent(wanted["workers"], kept)
        try:
            for name in ("msgpack", "msgpack_numpy", "zmq", "qjam_worker.node.node"):
                load(name, kept)
            become_node = load("qjam_worker.stdio_node", kept).become_node
            caches.prune()
            self.tell(bundle=paths)
            answer = self.find_way(probes)
        except BaseException:
            warm.end()
            raise
        become_node(answer, self.read, self.write, paths[1:], warm)

    def find_way(self, probes: "Probes") -> "Dict[str, Any]":
        """Probe what the master proposes until it is content."""
        while True:
            self.tell(way=probes.found(), tried=probes.tried)
            answer = self.hear()  # type: Dict[str, Any]
            if "ways" not in answer:
                return answer
            probes = Probes(answer["ways"])

    def receive(self, part: "Dict[str, Any]", caches: "Caches") -> str:
        from hashlib import sha256
        from io import BytesIO

        left, digest, data = part["size"], sha256(), BytesIO()
        while left:
            piece = self.read.read1(min(left, 1 << 20))
            if not piece:
                raise Gone
            left -= len(piece)
            digest.update(piece)
            data.write(piece)
        if digest.hexdigest() != part["sha256"]:
            raise Failed("%s was damaged on its way: its sha256 is %s" % (part["name"], digest.hexdigest()))
        return caches.unpack(part, data)


def facts() -> "Dict[str, Any]":
    """What a python can be given, and what it has already: {package: version}; an unknown version is an empty text."""
    from importlib.machinery import EXTENSION_SUFFIXES

    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        libc = ""
    if not libc and os.path.isdir("/lib"):
        libc = "musl 1.2" if any(name.startswith("ld-musl-") for name in os.listdir("/lib")) else ""
    uname = os.uname()
    return {
        "python": list(sys.version_info[:2]),
        "implementation": sys.implementation.name,
        "soabi": EXTENSION_SUFFIXES[0].strip(".").rpartition(".")[0],
        "machine": uname.machine,
        "libc": libc,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "has": installed(),
    }


def process() -> "Optional[List[int]]":
    """The pid of the node to be, and when it began, in ticks of the system; None where there is no /proc."""
    try:
        with open("/proc/self/stat", "rb") as file:
            return [os.getpid(), int(file.read().rpartition(b")")[2].split()[19])]
    except OSError:
        return None


def installed() -> "Dict[str, str]":
    """Found without an import: by folder, and by the metadata beside it, whose name tells the version."""
    has = {}  # type: Dict[str, str]
    for folder in sys.path:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for package, module in PACKAGES:
            # After an installation has been removed, a folder with what python had compiled may be left.
            if package not in has and module.split("/")[0] in names and os.path.exists(os.path.join(folder, module)):
                start = package.replace("-", "_") + "-"
                metadata = [name for name in names if name.lower().startswith(start) and "-info" in name]
                has[package] = metadata[0].split("-")[1].replace(".dist", "").replace(".egg", "") if metadata else ""
    return has


def load(name: str, kept: "List[Optional[str]]") -> "Any":
    """Import what the node needs. Raises Failed with the reason. `kept` are the parts that were here already: one that
    does not hold what it should (something has tidied up) goes, and the next start brings it anew.
    """
    from importlib import import_module

    try:
        module = import_module(name)
    except Exception as error:
        top = name.partition(".")[0]
        files = (top, top + ".py")
        damaged = [path for path in kept if path and any(os.path.lexists(os.path.join(path, name)) for name in files)]
        if damaged:
            from shutil import rmtree

            for path in damaged:
                rmtree(path, True)
            raise Failed(
                "%s was damaged in %s (%s: %s), which has been removed: start again"
                % (name, " and ".join(damaged), type(error).__name__, error)
            )
        raise Failed(
            "%s cannot be imported there (%s: %s); mend it, or name another python with python=..."
            % (name, type(error).__name__, error)
        )
    if name == "zmq" and not module.has("curve"):
        raise Failed("the pyzmq that is installed there (%s) was built without CURVE" % module.__version__)
    return module


def warm_parent(workers: int, kept: "List[Optional[str]]") -> "Any":
    """The parent of the workers, forked as soon as numpy is there: before ZeroMQ, and before any secret comes."""
    warm = load("qjam_worker.node.fork_server_client", kept)
    warm.prepare(workers)
    load("numpy", kept)
    return warm.fork()


class Probes:
    """Tries which of the master's addresses answer as a ROUTER does. All begin at once; ZeroMQ itself would try a dead
    one in silence for ever.
    """

    def __init__(self, ways: "Dict[str, Any]") -> None:
        import socket
        from time import monotonic

        self.ends = monotonic() + (ways["timeout"] if ways["addresses"] else 0)
        self.tried = []  # type: List[str]
        self.sockets = []  # type: List[Tuple[socket.socket, str, int]]
        client = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
        addresses = [tuple(address) for address in ways["addresses"]]
        if ways["seen"] and addresses and client:  # behind a translation of addresses the host sees another one
            addresses.insert(0, (client, addresses[0][1]))
        for host, port in dict.fromkeys(addresses):
            try:
                family, kind, protocol, _, place = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0]
                probe = socket.socket(family, kind, protocol)
                probe.setblocking(False)
                self.sockets.append((probe, host, port))
                probe.connect(place)
            except BlockingIOError:
                pass
            except OSError as error:
                self.tried.append("%s port %s: %s" % (host, port, error.strerror or error))

    def found(self) -> "Optional[List[Any]]":
        """The first address that answers, as [host, port], or None."""
        import select
        from time import monotonic

        waiting, found = {probe.fileno(): (probe, host, port) for probe, host, port in self.sockets}, None
        poll = select.poll()
        for fd in waiting:
            poll.register(fd, select.POLLIN)
        while waiting and found is None:
            answers = poll.poll(max(0.0, self.ends - monotonic()) * 1000)  # a look at least: the parts took their time
            if not answers:
                break
            for fd, _ in answers:
                probe, host, port = waiting.pop(fd)
                poll.unregister(fd)
                try:
                    said = probe.recv(GREETING)
                except OSError as error:
                    self.tried.append("%s port %s: %s" % (host, port, error.strerror or error))
                    continue
                if said[:1] == b"\xff" and said[9:10] in (b"", b"\x7f"):
                    found = found or [host, port]
                else:
                    what = "something else answers" if said else "the connection was closed"
                    self.tried.append("%s port %s: %s" % (host, port, what))
        self.tried += ["%s port %s: no answer" % (host, port) for _, host, port in waiting.values() if not found]
        for probe, _, _ in self.sockets:
            probe.close()
        return found


class Caches:
    """Where parts are kept, each in a directory that is named by its content: in the home if that can be, else in the
    first directory that can be written, has room, and lets libraries be loaded from it.
    """

    def __init__(self) -> None:
        home = os.path.expanduser("~")
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
        mine = PREFIX + str(os.getuid())
        others = ["/var/tmp", os.environ.get("TMPDIR") or "/tmp", "/dev/shm"]
        self.bases = [os.path.join(cache, "qjam")] + [folder.rstrip("/") + mine for folder in dict.fromkeys(others)]
        self.here = {}  # type: Dict[str, str]

    def held(self) -> "List[str]":
        """The ids of parts that are here, wherever, and that can be loaded from there."""
        held = {}  # type: Dict[str, str]
        for base in self.bases:
            try:
                if self.owned(base) and not self.noexec(os.statvfs(base)):
                    for name in os.listdir(base):
                        if len(name) == 64:
                            held.setdefault(name, os.path.join(base, name))
            except OSError:
                continue
        self.here = held
        return sorted(held)

    @staticmethod
    def owned(base: str) -> bool:
        """Whether the directory is ours and nobody else may write there: what lies there is run."""
        status = os.lstat(base)
        return (status.st_mode & 0o170000) == 0o040000 and status.st_uid == os.getuid() and not status.st_mode & 0o022

    @staticmethod
    def noexec(status: "os.statvfs_result") -> bool:
        return bool(status.f_flag & getattr(os, "ST_NOEXEC", 8))

    def use(self, part: "Dict[str, Any]") -> "Optional[str]":
        """The directory of a part that is here; it counts as used now."""
        path = self.here.get(part["id"])
        if path is not None:
            try:
                os.utime(path)
            except OSError:
                pass
        return path

    def unpack(self, part: "Dict[str, Any]", data: "BytesIO") -> str:
        """The directory of a part, made whole or not at all, also when several do so at once."""
        from shutil import rmtree
        from tempfile import mkdtemp
        from zipfile import ZipFile

        refused = []
        for base in self.bases:
            making = None  # type: Optional[str]
            try:
                self.check(base, part)
                making = mkdtemp(prefix=MAKING, dir=base)
                ZipFile(data).extractall(making)
                path = os.path.join(base, part["id"])
                try:
                    os.rename(making, path)
                except OSError:
                    if not os.path.isdir(path):  # else somebody else was faster
                        raise
                    rmtree(making, True)
                return path
            except OSError as error:
                refused.append("%s: %s" % (base, error.strerror or error))
                if making is not None:
                    rmtree(making, True)
        raise Failed("no place for %s (%d bytes): %s" % (part["name"], part["unpacked"], "; ".join(refused)))

    def check(self, base: str, part: "Dict[str, Any]") -> None:
        os.makedirs(base, 0o700, exist_ok=True)
        if not self.owned(base):
            raise OSError("it is not yours alone (owner and mode must be yours and 700)")
        room = os.statvfs(base)
        if room.f_bavail * room.f_frsize < part["unpacked"] * 5 // 4:
            raise OSError("no room: %d bytes are free" % (room.f_bavail * room.f_frsize))
        if part["native"] and self.noexec(room):
            raise OSError("mounted noexec, so no library can be loaded from there")

    @staticmethod
    def lock(path: str) -> "List[int]":
        """Mark a part as in use by this process; where the file system has no locks, nothing is marked."""
        import fcntl

        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return []
        return [lock]

    def prune(self) -> None:
        """Remove parts that were not used for long and that nobody uses now, and what was never finished."""
        import fcntl
        from shutil import rmtree
        from time import time

        def last_used(path: str) -> float:
            try:
                return os.stat(path).st_mtime
            except OSError:
                return 0.0

        for base in self.bases:
            try:
                for name in os.listdir(base) if self.owned(base) else ():
                    path = os.path.join(base, name)
                    if name.startswith(MAKING) and last_used(path) < time() - ABANDONED_DAYS * 86400:
                        rmtree(path, True)
            except OSError:
                pass
        old = time() - KEEP_DAYS * 86400
        ranked = sorted(self.here.values(), key=last_used, reverse=True)
        for rank, path in enumerate(ranked):
            if rank < KEEP_PARTS and last_used(path) > old:
                continue
            try:
                lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    rmtree(path, True)
                finally:
                    os.close(lock)
            except OSError:
                pass


def main(read: "BufferedReader") -> None:
    """Begin; `read` is the buffered stdin that this source came through."""
    sys.path[:] = [folder for folder in sys.path if folder]  # the home is no place for modules
    write = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not disturb
    bootstrap = Stage1(read, write)
    try:
        bootstrap.run()
    except Failed as error:
        bootstrap.tell(failed=str(error))
        sys.exit(1)
    except (Gone, BrokenPipeError):
        os._exit(0)
