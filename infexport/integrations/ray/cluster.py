"""Connection to Ray: a running cluster, or a temporary one on this machine."""

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
CONNECT_SECONDS = 5.0
"""Timeout of a connection. Ray itself keeps trying for minutes when nothing listens at the address."""
TOKEN = secrets.token_hex(32)
"""Authentication token of a Ray started here. Without it Ray would write one to the user's home folder. Ray keeps the
first token that it sees in a process.
"""
MAX_FOLDER_CHARACTERS = 24
"""Longest path of a temporary folder for Ray's sockets: Ray appends 83 characters, and a socket's path may have 107."""


@dataclass(frozen=True)
class Workers:
    """Number of workers, and the resources of each.

    Attributes:
        count: number of workers.
        threads: CPU cores per worker.
        gpus: GPUs per worker, 0 or 1.
        memory: bytes per worker; None if unknown.
    """

    count: int
    threads: int
    gpus: int
    memory: int | None


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to Ray and yield its module.

    Args:
        address: `local` starts Ray on this machine: not reachable from other machines, without dashboard or telemetry,
            and removed at the end. `auto`, `host:port` or `ray://host:port` connect to a running cluster. If the
            program has connected Ray already, that connection is used.

    Raises:
        InfexportError: no cluster answers, or Ray is not installed.
    """
    require("ray", extra="scale")
    with _environment(address):
        ray = _imported(address)
        if ray.is_initialized():
            yield ray
            return
        if address != LOCAL:
            with _start_errors(ray, address):  # first: nothing has been started yet that would have to be ended
                _check_reachable(address)
        folders = tempfile.gettempdir()
        root = "/tmp" if len(folders) > MAX_FOLDER_CHARACTERS and os.name == "posix" else folders
        with tempfile.TemporaryDirectory(prefix="infexport-", dir=root, ignore_cleanup_errors=True) as folder:
            try:
                with _signals_held(), _stderr_silenced(), _start_errors(ray, address):
                    _connect(ray, address, folder)
                yield ray
            finally:
                ray.shutdown()
                _end_processes(folder)


_here: list[ModuleType] = []
"""Ray's module, once it was imported with the environment that `_environment` sets; else empty."""


def _imported(address: str) -> ModuleType:
    """Import Ray, which reads its environment once, at import.

    Raises:
        InfexportError: Ray was imported before, without the environment that keeps a local Ray private.
    """
    early = "ray" in sys.modules and not _here
    import ray

    if not early:
        _here[:] = [ray]
    elif address == LOCAL and not ray.is_initialized():
        raise InfexportError(
            "Ray was imported before infexport could restrict it to this machine",
            hint="call ray.init() first, or import ray later",
        )
    module: ModuleType = ray
    return module


@contextmanager
def _environment(address: str) -> Iterator[None]:
    """Set the environment variables that Ray reads only at import, and restore them afterwards."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_DATA_LOG_LEVEL": "CRITICAL",
        # else a late call from a thread would start another Ray, with defaults
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }
    if address == LOCAL:
        # as on systems without clusters: all processes of Ray listen on the loopback address only
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        # normal priority: by default Ray's workers yield to all other processes
        variables["RAY_worker_niceness"] = "0"
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Discard stderr at the file descriptor: Ray's C++ code writes there in spite of its log level."""
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
    """Delay handled signals until Ray has started; handle a second signal at once.

    An exception during the start would be reported as Ray's failure, or lost, and would leave processes. Ray also
    replaces the handler of SIGTERM permanently, which is prevented here.
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
    """Kill the processes that Ray started for this folder: after a failed start `ray.shutdown` does not end them."""
    import psutil  # installed with Ray

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
    """Raise an `InfexportError` where Ray cannot be connected."""
    try:
        yield
    except (Exception, SystemExit) as error:  # Ray raises its own classes, which have several bases
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:  # from a second signal
            raise
        text = " ".join(str(error).split())
        if address == LOCAL:
            raise InfexportError("Ray does not start on this machine", text, "run without --ray") from error
        raise InfexportError(
            f"no Ray cluster at {address}",
            text,
            f"check that one runs there, with Ray {ray.__version__} and this Python; --ray with no address needs none",
        ) from error


def _check_reachable(address: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            pass


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray, whose text is a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def plan_workers(ray: ModuleType, count: int | None, threads: int | None, by_node: bool) -> Workers:
    """Choose number and resources of workers such that each fits on one node.

    Args:
        ray: Ray's module, connected.
        count: number of workers; None for one per GPU or, without GPUs, one per `threads` cores or per node.
        threads: cores per worker; None for the most that all workers can have.
        by_node: without GPUs, default to one worker per node rather than per core: few large shards of an image
            exchange less than many small ones.

    Raises:
        InfexportError: the cluster has too few cores or GPUs.
    """
    nodes: list[Mapping[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    nodes = [node for node in nodes if int(node.get("CPU", 0)) and (node.get("GPU") or not gpus)]
    if not nodes:
        raise InfexportError("the Ray cluster has no CPUs", hint="add nodes to it, or leave out --ray")

    def places(threads: int) -> list[int]:
        """Return the number of workers that fit on each node."""
        return [int(min(node["CPU"] // threads, node["GPU"] if gpus else node["CPU"])) for node in nodes]

    most = int(max(node["CPU"] for node in nodes))
    if count is None:
        count = len(nodes) if by_node and not gpus else max(1, sum(places(threads or 1)))
    if threads is None:
        threads = next((n for n in range(most, 0, -1) if sum(places(n)) >= count), 1)
    if sum(places(threads)) < count:
        has = [f"{node['CPU']:.0f} cores" + (f" and {node['GPU']:.0f} GPUs" if gpus else "") for node in nodes]
        raise InfexportError(
            f"not enough cores for {count} workers of {threads} cores each",
            f"the cluster has {', '.join(has)}",
            "reduce --workers or --threads",
        )
    known = [
        node["memory"] / min(n, count) for node, n in zip(nodes, places(threads), strict=True) if n and "memory" in node
    ]
    return Workers(count, threads, int(gpus > 0), int(min(known)) if known else None)
