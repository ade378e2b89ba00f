"""Connection to Ray, and the plan of its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from children import descendants
from support import ZOO

from infexport.errors import InfexportError
from infexport.integrations.ray import cluster
from infexport.integrations.ray.cluster import plan_workers

pytestmark = pytest.mark.ray
LISTENING = "0A"


def listening() -> list[str]:
    """Return addresses at which this process's descendants listen, in the hexadecimal form of /proc."""
    sockets = set()
    for process in descendants():
        try:
            sockets |= {str(file.readlink()) for file in Path(f"/proc/{process}/fd").iterdir()}
        except OSError:
            continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [line[1].partition(":")[0] for line in lines if line[3] == LISTENING and f"socket:[{line[9]}]" in sockets]


def test_started_here_it_is_reachable_from_here_alone(ray):
    addresses = listening()
    assert len(addresses) >= 3  # of the head and its daemons
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(addresses) <= loopback


def test_it_says_nothing_to_its_makers_and_shows_no_page(ray):
    started = {text: Path(f"/proc/{process}/environ").read_bytes() for process, text in descendants().items()}
    daemons = [text for text in started if "gcs_server" in text.split()[0] or "dashboard/dashboard.py" in text]
    assert len(daemons) == 2
    assert all(b"RAY_USAGE_STATS_ENABLED=0" in started[text] for text in daemons)
    # the head of the dashboard runs even without a dashboard, to report usage where that is enabled
    assert all("--disable-frontend" in text for text in started if "dashboard/dashboard.py" in text)


def test_nobody_at_an_address(infexport, ray, zoo_bundle, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as silent:  # taken, and nobody listens
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        arguments = ("run-engine", zoo_bundle("digits-linear"), ZOO / "digits-held-out", "--shard-image", "--ray")
        results = {name: infexport(*arguments, name, exit_code=2) for name in (address, f"ray://{address}")}
    for name, result in results.items():
        assert f"error: no Ray cluster at {name}" in result.stderr
        assert "refused" in result.stderr
        assert "--ray with no address needs none" in result.stderr


def test_an_address_that_is_none(infexport, zoo_bundle):
    result = infexport("run-engine", "--ray", zoo_bundle("digits-linear"), "a.png", exit_code=2)
    assert "without an address, --ray goes last" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", 2),
        ("--shard-image",),
        ("--ray", "local", "--heatmaps", "maps"),
        ("--ray", "local", "--shard-image", "--scratch", "s"),
        ("--ray", "local", "--shard-image", "--execution", "whole"),
    ],
)
def test_options_that_do_not_go_together(infexport, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = infexport("run-engine", "bundle", "a.png", *options, exit_code=2)
    assert "Usage:" in result.stderr


class Nodes:
    """A connected Ray whose nodes have the given resources."""

    def __init__(self, *resources):
        self.resources = resources

    def nodes(self):
        return [{"Alive": True, "Resources": one} for one in self.resources] + [{"Alive": False, "Resources": {}}]


def node(cores, gpus=0, memory=2**30):
    return {"CPU": float(cores), "memory": float(memory), **({"GPU": float(gpus)} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "count", "threads", "by_node", "expected"),
    [
        ([node(8)], None, None, False, (8, 1, 0, 2**27)),
        ([node(8)], None, 4, False, (2, 4, 0, 2**29)),
        ([node(8)], 2, None, False, (2, 4, 0, 2**29)),
        ([node(8), node(16)], None, None, True, (2, 8, 0, 2**29)),
        ([node(8, 2), node(8, 2)], None, None, False, (4, 4, 1, 2**29)),
        # each worker fits on one node
        ([node(3), node(3)], None, 2, False, (2, 2, 0, 2**30)),
        ([node(8, 2), node(8)], None, None, False, (2, 4, 1, 2**29)),
        ([node(1), node(16), node(16)], None, None, True, (3, 8, 0, 2**29)),
        ([{"CPU": 4.0}], 2, None, False, (2, 2, 0, None)),
    ],
)
def test_workers(nodes, count, threads, by_node, expected):
    found = plan_workers(Nodes(*nodes), count, threads, by_node)
    assert (found.count, found.threads, found.gpus, found.memory) == expected


@pytest.mark.parametrize(
    ("nodes", "count", "threads", "told"),
    [([node(3), node(3)], 3, 2, "3 cores, 3 cores"), ([node(8, 1)], 4, None, "8 cores and 1 GPUs")],
)
def test_workers_that_have_no_place(nodes, count, threads, told):
    with pytest.raises(InfexportError, match=f"not enough cores for {count} workers") as caught:
        plan_workers(Nodes(*nodes), count, threads, by_node=False)
    assert caught.value.details == f"the cluster has {told}"


def test_ray_that_was_imported_before(tmp_path):
    """Ray has read its environment by then, and would listen on all addresses."""
    code = "import ray\nfrom infexport.integrations.ray.cluster import connected\nwith connected('local'): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "Ray was imported before infexport could restrict it to this machine" in done.stderr


def test_a_cluster_without_cores():
    with pytest.raises(InfexportError, match="no CPUs"):
        plan_workers(Nodes(), None, None, by_node=False)


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with cluster._environment("local"):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


class Handled(Exception):
    pass


@pytest.fixture
def handled():
    """SIGTERM raises `Handled`, as it does in a program that cleans up."""

    def handle(number, frame):
        raise Handled

    before = signal.signal(signal.SIGTERM, handle)
    yield handle
    signal.signal(signal.SIGTERM, before)


def started(signals=1, error=None):
    """Send signals during a start, which may fail."""
    with cluster._signals_held():
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        if error:
            raise error


def test_a_signal_waits_until_ray_has_started(handled):
    with pytest.raises(Handled):
        started()
    assert signal.getsignal(signal.SIGTERM) is handled


def test_a_signal_is_told_rather_than_a_start_that_fails(handled):
    with pytest.raises(Handled):
        started(error=RuntimeError("no start"))


def test_a_second_signal_does_not_wait(handled):
    with pytest.raises(Handled):
        started(2, AssertionError("went on"))


def test_ray_takes_no_signal_for_itself(handled):
    with cluster._signals_held():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nobody's
    assert signal.getsignal(signal.SIGTERM) is handled
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN


def test_signals_are_left_alone_in_other_threads():
    def held():
        with cluster._signals_held():
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(held).result()


def session(number: int) -> list[int]:
    """Return the live processes of a session."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader = file.read_text().rpartition(")")[2].split()[:4]
            found += [int(file.parent.name)] if int(leader) == number and state != "Z" else []
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_while_ray_starts_leaves_nothing(number, code, zoo_bundle, tmp_path):
    arguments = ["run-engine", str(zoo_bundle("digits-linear")), str(ZOO / "digits-held-out"), "--ray"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = (
        os.environ | {"TMPDIR": str(tmp_path)} if len(str(tmp_path)) <= cluster.MAX_FOLDER_CHARACTERS else os.environ
    )
    process = subprocess.Popen(
        [f"{sys.prefix}/bin/infexport", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
        env=environment,
    )
    while len(session(process.pid)) < 3:  # Ray's first processes
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Ray does not start" not in told
    deadline = time.monotonic() + 10
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session(process.pid) == []


def test_what_a_start_that_fails_has_started_is_ended(ray, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    cluster._end_processes(str(tmp_path))
    assert process.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()
