"""Where workers run: a Ray cluster that is there, or one on this machine for as long as it is needed."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

from infexport.errors import InfexportError
from infexport.images.decode import MAX_PIXELS_VARIABLE
from infexport.system.dependencies import require
from infexport.system.host import usable_cores

LOCAL = "local"
SECONDS = 5.0
"""To connect. Ray itself goes on trying for minutes where nobody listens."""
TOKEN = secrets.token_hex(32)
"""Of a Ray started here, in place of one that it would leave in the user's home; it keeps the first that it sees."""
LONGEST = 24
"""Characters of a temporary folder in which Ray's sockets can lie: their paths have 83 more, and may have 107."""


@dataclass(frozen=True)
class Workers:
    """How many there are, and what each may use.

    Attributes:
        count: of workers.
        threads: CPU cores of each.
        gpus: of each, 0 or 1.
        memory: bytes of each; None where that is not known.
    """

    count: int
    threads: int
    gpus: int
    memory: int | None


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected.

    Args:
        address: `local` starts it on this machine: reachable from nowhere else, no dashboard, no telemetry, no trace
            left. Otherwise `auto`, `host:port` or `ray://host:port`, of one that runs. Where the program has connected
            Ray already, that is taken.

    Raises:
        InfexportError: nobody is there, or Ray is not installed.
    """
    require("ray", extra="scale")
    with _environment(address):
        ray = _imported(address)
        if ray.is_initialized():
            yield ray
            return
        if address != LOCAL:
            with _start_errors(ray, address):  # before anything is started, which would have to be ended
                _check_reachable(address)
        folders = tempfile.gettempdir()
        root = "/tmp" if len(folders) > LONGEST and os.name == "posix" else folders
        with tempfile.TemporaryDirectory(prefix="infexport-", dir=root, ignore_cleanup_errors=True) as folder:
            try:
                with _signals_held(), _hushed(), _start_errors(ray, address):
                    _connect(ray, address, folder)
                yield ray
            finally:
                ray.shutdown()
                _end_processes(folder)


_here: list[ModuleType] = []
"""Ray, once it was imported as it should be."""


def _imported(address: str) -> ModuleType:
    """Ray, which reads its environment once.

    Raises:
        InfexportError: it was imported before, without what makes a local one private.
    """
    early = "ray" in sys.modules and not _here
    import ray

    if not early:
        _here[:] = [ray]
    elif address == LOCAL and not ray.is_initialized():
        raise InfexportError(
            "Ray was imported before infexport could tell it to stay on this machine",
            hint="call ray.init() before, or import ray later",
        )
    module: ModuleType = ray
    return module


@contextmanager
def _environment(address: str) -> Iterator[None]:
    """What Ray is told by the environment alone, when it is imported."""
    told = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_DATA_LOG_LEVEL": "CRITICAL",
        # it would start another Ray, with defaults, where a thread comes late
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }
    if address == LOCAL:
        # what Ray does where it has no clusters: all its processes listen on the loopback address only
        told["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        told |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        # workers are what the user asked for: by default they give way to whatever else runs
        told["RAY_worker_niceness"] = "0"
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing written to stderr, by whatever language: Ray's C++ says there that it was told to say nothing."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back that are handled, until Ray has started; a second one is handled at once.

    An exception in the middle of it is taken for Ray's failure, or lost, and leaves processes. Ray also takes SIGTERM
    for itself, for good, which is not granted.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled elsewhere
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if len(held) > 1:
            handlers[signal.Signals(number)](number, frame)

    change = signal.signal
    for number in handlers:
        change(number, hold)

    def granted(number: Any, handler: Any) -> Any:
        return hold if number in handlers else change(number, handler)

    signal.signal = granted  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = change
        for number, handler in handlers.items():
            change(number, handler)
        if held:
            signal.raise_signal(held[0])


def _end_processes(folder: str) -> None:
    """End what Ray has started for a folder of its own: where its start fails, `ray.shutdown` knows nothing of it."""
    import psutil  # Ray brings it

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                process.kill()


def _connect(ray: ModuleType, address: str, folder: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        cores = usable_cores()
        ray.init(address=LOCAL, num_cpus=cores, include_dashboard=False, _temp_dir=folder, **quiet)
    else:
        limit = {name: os.environ[name] for name in (MAX_PIXELS_VARIABLE,) if name in os.environ}
        ray.init(address=address, runtime_env={"env_vars": limit} if limit else None, **quiet)


@contextmanager
def _start_errors(ray: ModuleType, address: str) -> Iterator[None]:
    """Tell why Ray cannot be connected, as our error."""
    try:
        yield
    except (Exception, SystemExit) as error:  # Ray raises its own kinds, and of several bases
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:  # a second signal's
            raise
        text = " ".join(str(error).split())
        if address == LOCAL:
            raise InfexportError("Ray does not start on this machine", text, "run it without --ray") from error
        raise InfexportError(
            f"no Ray cluster at {address}",
            text,
            f"is one running there, with Ray {ray.__version__} and this Python? --ray with no address needs none",
        ) from error


def _check_reachable(address: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS):
            pass


def last_line(error: Exception) -> str:
    """Of what Ray says, which is a traceback: what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def plan_workers(ray: ModuleType, count: int | None, threads: int | None, by_node: bool) -> Workers:
    """The workers of a cluster, each of which has a place on one of its nodes.

    Args:
        ray: connected.
        count: of workers; None for one per GPU, or where there is none, per core (of `threads`), or per node.
        threads: cores of each; None for as many as all of them can have.
        by_node: one per node rather than per core: it is one work, in as few parts as have all cores.

    Raises:
        InfexportError: more than the cluster has.
    """
    nodes: list[Mapping[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    nodes = [node for node in nodes if int(node.get("CPU", 0)) and (node.get("GPU") or not gpus)]
    if not nodes:
        raise InfexportError("the Ray cluster has no CPUs", hint="add nodes to it, or leave out --ray")

    def places(threads: int) -> list[int]:
        """On every node."""
        return [int(min(node["CPU"] // threads, node["GPU"] if gpus else node["CPU"])) for node in nodes]

    most = int(max(node["CPU"] for node in nodes))
    if count is None:
        count = len(nodes) if by_node and not gpus else max(1, sum(places(threads or 1)))
    if threads is None:
        threads = next((n for n in range(most, 0, -1) if sum(places(n)) >= count), 1)
    if sum(places(threads)) < count:
        has = [f"{node['CPU']:.0f} cores" + (f" and {node['GPU']:.0f} GPUs" if gpus else "") for node in nodes]
        raise InfexportError(
            f"no place for {count} workers of {threads} cores each",
            f"the cluster has {', '.join(has)}",
            "use fewer of either",
        )
    known = [
        node["memory"] / min(n, count) for node, n in zip(nodes, places(threads), strict=True) if n and "memory" in node
    ]
    return Workers(count, threads, int(gpus > 0), int(min(known)) if known else None)
