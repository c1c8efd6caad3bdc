"""Runs first on a host: reports what is there, receives what is missing, finds a route to the master, becomes the node.

The host process sends this source to `python3 -c` through stdin, so it uses only the standard library. It imports
modules late, to start fast. A python that is too old must be able to read it, in order to say so. Messages are lines
of JSON in both directions. A part is a zip file with the bundle or a package; parts follow their message as raw bytes.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import BufferedReader, BytesIO
    from typing import Any, Dict, List, Optional, Tuple  # noqa: F401  used in comments


OLDEST = (3, 9)  # python
PREFIX = "/qjam-"  # of directories outside the home; the user's number follows
KEEP_DAYS, KEEP_PARTS = 30, 16  # unused parts are removed if they are older, or if there are more
MAKING, ABANDONED_DAYS = "making-", 1  # directories where parts are unpacked; removed if this old
PACKAGES = (  # name of the distribution, file that it must have
    ("numpy", "numpy/__init__.py"),
    ("pyzmq", "zmq/__init__.py"),
    ("msgpack", "msgpack/__init__.py"),
    ("msgpack-numpy", "msgpack_numpy.py"),
    ("cloudpickle", "cloudpickle/__init__.py"),
)
GREETING = 64  # bytes of the greeting of ZeroMQ's protocol: the first is FF, the tenth 7F


class Failed(Exception):
    """The start has failed; the text is for the user."""


class MasterGone(Exception):
    """The host process has closed our stdin."""


class Bootstrap:
    """The bootstrap. `read`: the buffered stdin; `write`: a copy of stdout, to which nothing else may write."""

    def __init__(self, read: "BufferedReader", write: int) -> None:
        self.read = read
        self.write = write
        self.locks = []  # type: List[int]

    def send(self, **message: "Any") -> None:
        import json  # only after `main` has removed the current folder from sys.path: it may hold a json.py

        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.write, data) :]

    def receive(self) -> "Any":
        import json

        line = self.read.readline()
        if not line:
            raise MasterGone
        return json.loads(line)

    def run(self) -> None:
        hello = self.receive()
        os.write(self.write, hello["marker"].encode() + b"\n")  # the host process skips what the login printed before
        if sys.version_info < OLDEST:
            version = ".".join(map(str, sys.version_info[:3]))
            raise Failed("%s is python %s; qjam needs %d.%d or newer on a host" % (sys.executable, version, *OLDEST))
        os.environ.update(hello["env"])
        if not sys.flags.ignore_environment:
            sys.path[:0] = filter(None, hello["env"].get("PYTHONPATH", "").split(os.pathsep))
        caches = Caches()
        self.send(facts=facts(), cached=caches.find(), python=sys.executable, process=process())
        probes = Probes(hello["ways"])  # they run while the parts arrive
        wanted = self.receive()
        cached = [caches.use(part) for part in wanted["parts"]]
        paths = [path or self.receive_part(part, caches) for path, part in zip(cached, wanted["parts"])]
        self.locks = [lock for path in paths for lock in caches.lock(path)]
        sys.path[:0] = paths
        fork_server = start_fork_server(wanted["workers"], cached)
        try:
            for name in ("msgpack", "msgpack_numpy", "zmq", "qjam_worker.node.node"):
                load(name, cached)
            become_node = load("qjam_worker.stdio_node", cached).become_node
            caches.prune()
            self.send(bundle=paths)
            welcome = self.find_route(probes)
        except BaseException:
            fork_server.end()
            raise
        become_node(welcome, self.read, self.write, paths[1:], fork_server)

    def find_route(self, probes: "Probes") -> "Dict[str, Any]":
        """Report which address answered, and probe others if the host process sends some. Returns its final answer."""
        while True:
            self.send(way=probes.found(), tried=probes.tried)
            answer = self.receive()  # type: Dict[str, Any]
            if "ways" not in answer:
                return answer
            probes = Probes(answer["ways"])

    def receive_part(self, part: "Dict[str, Any]", caches: "Caches") -> str:
        """Read a part from stdin and unpack it. Returns its directory."""
        from hashlib import sha256
        from io import BytesIO

        left, digest, data = part["size"], sha256(), BytesIO()
        while left:
            piece = self.read.read1(min(left, 1 << 20))
            if not piece:
                raise MasterGone
            left -= len(piece)
            digest.update(piece)
            data.write(piece)
        if digest.hexdigest() != part["sha256"]:
            raise Failed("%s was damaged on its way: its sha256 is %s" % (part["name"], digest.hexdigest()))
        return caches.unpack(part, data)


def facts() -> "Dict[str, Any]":
    """What decides which packages this python can use, and in `has` those that it has: {package: version or ""}."""
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
    """The pid of this process, which becomes the node, and when it began (in clock ticks); None without /proc."""
    try:
        with open("/proc/self/stat", "rb") as file:
            return [os.getpid(), int(file.read().rpartition(b")")[2].split()[19])]
    except OSError:
        return None


def installed() -> "Dict[str, str]":
    """Find packages without importing them: by folder, and by the metadata beside it, whose name has the version."""
    has = {}  # type: Dict[str, str]
    for folder in sys.path:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for package, module in PACKAGES:
            # A package that was removed may leave a folder with compiled files.
            if package not in has and module.split("/")[0] in names and os.path.exists(os.path.join(folder, module)):
                start = package.replace("-", "_") + "-"
                metadata = [name for name in names if name.lower().startswith(start) and "-info" in name]
                has[package] = metadata[0].split("-")[1].replace(".dist", "").replace(".egg", "") if metadata else ""
    return has


def load(name: str, cached: "List[Optional[str]]") -> "Any":
    """Import a module. Raises Failed. If the import fails in a cached part, perhaps because its files were deleted,
    remove the part: the next start sends it again.
    """
    from importlib import import_module

    try:
        module = import_module(name)
    except Exception as error:
        top = name.partition(".")[0]
        files = (top, top + ".py")
        damaged = [path for path in cached if path and any(os.path.lexists(os.path.join(path, name)) for name in files)]
        if damaged:
            from shutil import rmtree

            for path in damaged:
                rmtree(path, True)
            raise Failed(
                "%s was damaged in %s (%s: %s), which has been removed: start again"
                % (name, " and ".join(damaged), type(error).__name__, error)
            )
        raise Failed(
            "%s cannot be imported there (%s: %s); repair it, or name another python with python=..."
            % (name, type(error).__name__, error)
        )
    if name == "zmq" and not module.has("curve"):
        raise Failed("the pyzmq that is installed there (%s) was built without CURVE" % module.__version__)
    return module


def start_fork_server(workers: int, cached: "List[Optional[str]]") -> "Any":
    """Fork the fork server after numpy is imported, but before ZeroMQ is, and before a secret arrives."""
    client = load("qjam_worker.node.fork_server_client", cached)
    client.prepare(workers)
    load("numpy", cached)
    return client.fork()


class Probes:
    """Connects to all addresses of the master at once, to see which one answers with ZeroMQ's greeting.

    ZeroMQ itself would try a dead address for ever, without an error.
    """

    def __init__(self, ways: "Dict[str, Any]") -> None:
        import socket
        from time import monotonic

        self.ends = monotonic() + (ways["timeout"] if ways["addresses"] else 0)
        self.tried = []  # type: List[str]
        self.sockets = []  # type: List[Tuple[socket.socket, str, int]]
        client = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
        addresses = [tuple(address) for address in ways["addresses"]]
        if ways["seen"] and addresses and client:  # behind NAT the host sees another address
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
            answers = poll.poll(max(0.0, self.ends - monotonic()) * 1000)  # poll once, even if time is up
            if not answers:
                break
            for fd, _ in answers:
                probe, host, port = waiting.pop(fd)
                poll.unregister(fd)
                try:
                    greeting = probe.recv(GREETING)
                except OSError as error:
                    self.tried.append("%s port %s: %s" % (host, port, error.strerror or error))
                    continue
                if greeting[:1] == b"\xff" and greeting[9:10] in (b"", b"\x7f"):
                    found = found or [host, port]
                else:
                    what = "something else answers" if greeting else "the connection was closed"
                    self.tried.append("%s port %s: %s" % (host, port, what))
        self.tried += ["%s port %s: no answer" % (host, port) for _, host, port in waiting.values() if not found]
        for probe, _, _ in self.sockets:
            probe.close()
        return found


class Caches:
    """The directories with cached parts, each part in a directory named by its hash. A new part goes to the home if
    possible, otherwise to the first directory that is writable, has room and allows libraries to be loaded.
    """

    def __init__(self) -> None:
        home = os.path.expanduser("~")
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
        mine = PREFIX + str(os.getuid())
        others = ["/var/tmp", os.environ.get("TMPDIR") or "/tmp", "/dev/shm"]
        self.bases = [os.path.join(cache, "qjam")] + [folder.rstrip("/") + mine for folder in dict.fromkeys(others)]
        self.paths = {}  # type: Dict[str, str]  # of the cached parts, by id

    def find(self) -> "List[str]":
        """Find the cached parts that can be loaded. Returns their ids."""
        paths = {}  # type: Dict[str, str]
        for base in self.bases:
            try:
                if self.owned(base) and not self.noexec(os.statvfs(base)):
                    for name in os.listdir(base):
                        if len(name) == 64:
                            paths.setdefault(name, os.path.join(base, name))
            except OSError:
                continue
        self.paths = paths
        return sorted(paths)

    @staticmethod
    def owned(base: str) -> bool:
        """Whether the directory is ours and nobody else may write to it: qjam runs code from there."""
        status = os.lstat(base)
        return (status.st_mode & 0o170000) == 0o040000 and status.st_uid == os.getuid() and not status.st_mode & 0o022

    @staticmethod
    def noexec(status: "os.statvfs_result") -> bool:
        return bool(status.f_flag & getattr(os, "ST_NOEXEC", 8))

    def use(self, part: "Dict[str, Any]") -> "Optional[str]":
        """Return the directory of a cached part, and mark it as used now; None if it is not cached."""
        path = self.paths.get(part["id"])
        if path is not None:
            try:
                os.utime(path)
            except OSError:
                pass
        return path

    def unpack(self, part: "Dict[str, Any]", data: "BytesIO") -> str:
        """Unpack a part completely or not at all, also if several processes do so at once. Returns its directory."""
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
                    if not os.path.isdir(path):  # else another process was faster
                        raise
                    rmtree(making, True)
                return path
            except OSError as error:
                refused.append("%s: %s" % (base, error.strerror or error))
                if making is not None:
                    rmtree(making, True)
        raise Failed("no place for %s (%d bytes): %s" % (part["name"], part["unpacked"], "; ".join(refused)))

    def check(self, base: str, part: "Dict[str, Any]") -> None:
        """Raise OSError if the part cannot go to this directory, which is created if it does not exist."""
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
        """Mark a part as in use by this process. Returns the locked descriptor, or [] if there are no locks."""
        import fcntl

        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return []
        return [lock]

    def prune(self) -> None:
        """Remove old parts that no process uses, and directories that a killed start has left."""
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
        ranked = sorted(self.paths.values(), key=last_used, reverse=True)
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
    """Run the bootstrap. `read` is the buffered stdin from which this source was read."""
    sys.path[:] = [folder for folder in sys.path if folder]  # never import from the current folder
    write = os.dup(1)
    os.dup2(2, 1)  # what other code prints goes to stderr, not between our messages
    bootstrap = Bootstrap(read, write)
    try:
        bootstrap.run()
    except Failed as error:
        bootstrap.send(failed=str(error))
        sys.exit(1)
    except (MasterGone, BrokenPipeError):
        os._exit(0)
