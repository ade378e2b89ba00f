"""A model of the python backend in Triton Inference Server itself, by HTTP and gRPC."""

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the server is for Linux on x86_64"
    ),
]
ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "tritonserver"
MAX_PIXELS = 4096 * 4096
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


def free_ports(count):
    """Return distinct free ports, which are held at the same time."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def with_me():
    """Make the server end with these tests, however they end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process):
    """End the server with SIGTERM, on which it frees its shared memory; kill its process group otherwise."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment():
    """Return an environment whose `python3` is the one that runs the tests: the stub imports its packages."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def server(infexport, zoo_bundle, tmp_path_factory):
    """A server with one model, `digits`."""
    folder = tmp_path_factory.mktemp("serving")
    fetched = subprocess.run([SCRIPT, "--fetch"], capture_output=True, text=True, env=environment())
    if fetched.returncode:
        pytest.skip(f"no server here: {fetched.stderr.strip().splitlines()[-1]}")
    if shutil.disk_usage("/dev/shm").free < 2**28:
        pytest.skip("requests pass through shared memory, of which there is too little")
    bundle = zoo_bundle("canvases-linear")
    options = ("--backend", "python", "--max-pixels", MAX_PIXELS, "--max-queue-delay", 1000)
    infexport("package", "triton", bundle, "-o", folder / "models", "--name", "digits", *options)
    http, grpc = free_ports(2)
    command = [SCRIPT, folder / "models", "--http-port", str(http), "--grpc-port", str(grpc)]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, preexec_fn=with_me, env=environment()
        )
    try:
        ready = f"http://127.0.0.1:{http}/v2/health/ready"
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield SimpleNamespace(
            bundle=bundle, ports={"http": http, "grpc": grpc}, url=f"http://127.0.0.1:{http}/v2/models/digits"
        )
        assert process.poll() is None, log.read_text()
    finally:
        end(process)


def ask(server, images, protocol="grpc", name="image", dtype="UINT8", **options):
    """Return the server's response to a new client."""
    module = PROTOCOLS[protocol]
    timeouts = {"network_timeout": 120.0} if protocol == "http" else {}
    with module.InferenceServerClient(f"127.0.0.1:{server.ports[protocol]}", **timeouts) as client:
        given = module.InferInput(name, list(images.shape), dtype)
        given.set_data_from_numpy(images)
        wanted = [module.InferRequestedOutput(output, **options) for output in ("logits", "features")]
        found = client.infer("digits", [given], outputs=wanted[: 1 if options else 2])
        return {output.name(): found.as_numpy(output.name()) for output in wanted[: 1 if options else 2]}


def alive(server):
    """Assert that the server still responds."""
    assert ask(server, np.zeros((1, 8, 8, 3), np.uint8))["logits"].shape == (1, 10)


def run_engine(infexport, server, tmp_path, images, *options):
    """Return logits and features of `run-engine --size native` for images, one file each."""
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file, compress_level=0)
    arguments = ("--size", "native", "--provider", "cpu", "--features", "--output", tmp_path / "out.npz")
    infexport("run-engine", server.bundle, *files, *arguments, *options)
    with np.load(tmp_path / "out.npz") as found:
        return {name: found[name] for name in ("logits", "features")}


def pixels(*shape):
    return np.random.default_rng(shape[-2]).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_are_those_of_run_engine(protocol, server, infexport, tmp_path):
    """One image of whole patches, one that is completed, one that is streamed, three at once."""
    for shape in ((1, 64, 64, 3), (1, 70, 91, 3), (1, 600, 600, 3), (3, 64, 48, 3)):
        images = pixels(*shape)
        expected = run_engine(infexport, server, tmp_path, images, "--batch-size", len(images))
        found = ask(server, images, protocol)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_large_image_is_streamed(protocol, server, infexport, tmp_path):
    """The largest image that the server accepts: 262,145 tokens."""
    images = pixels(1, 4096, 4096, 3)
    expected = run_engine(infexport, server, tmp_path, images, "--execution", "stream")
    np.testing.assert_array_equal(ask(server, images, protocol)["logits"], expected["logits"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels(protocol, server):
    """Triton's own classification returns value, index and label."""
    images = pixels(2, 64, 64, 3)
    logits = ask(server, images)["logits"]
    classes = ask(server, images, protocol, class_count=3)["logits"]
    assert classes.shape == (2, 3)
    for row, told in zip(logits, classes, strict=True):
        value, index, label = told[0].decode().split(":")
        assert (int(index), label) == (row.argmax(), str(row.argmax()))
        assert float(value) == pytest.approx(row.max(), abs=1e-5)


def test_the_client_of_the_documentation(server, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    images = pixels(1, 72, 64, 3)
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    code = code.replace("photo.jpg", "photo.png").replace('"images"', '"digits"')
    code = code.replace("localhost:8000", f"127.0.0.1:{server.ports['http']}")
    told = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert told.strip().split(":")[1] == str(ask(server, images)["logits"].argmax())


def test_eight_clients_at_once(server):
    """Clients use both protocols and two sizes, whose requests Triton and Predictor batch."""
    images = [pixels(1, 64, 64, 3), pixels(2, 40, 33, 3)]
    expected = [ask(server, each)["logits"] for each in images]

    def client(index):
        protocol = ("http", "grpc")[index % 2]
        return [ask(server, images[turn % 2], protocol)["logits"] for turn in range(index, index + 12)]

    with ThreadPoolExecutor(8) as pool:
        for index, answers in enumerate(pool.map(client, range(8))):
            for turn, logits in enumerate(answers, index):
                np.testing.assert_allclose(logits, expected[turn % 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (np.zeros((1, 4097, 4096, 3), np.uint8), {}, "received 16,781,312, expected 1 to 16,777,216"),
        (np.zeros((1, 0, 64, 3), np.uint8), {}, "received 0, expected 1 to 16,777,216"),
        (np.zeros((9, 8, 8, 3), np.uint8), {}, "batch-size must be <= 8"),
        (np.zeros((1, 8, 8, 4), np.uint8), {}, "unexpected shape for input 'image'"),
        (np.zeros((1, 8, 8), np.uint8), {}, "unexpected shape for input 'image'"),
        (np.zeros((1, 8, 8, 3), np.float32), {"dtype": "FP32"}, "inference input 'image' data-type is 'FP32'"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"name": "pixels"}, "unexpected inference input 'pixels'"),
    ],
    ids=["oversized", "empty", "batch", "channels", "rank", "dtype", "name"],
)
def test_what_is_no_image_is_refused(images, options, words, protocol, server):
    with pytest.raises(InferenceServerException, match=words):
        ask(server, images, protocol, **options)
    alive(server)


def test_one_bad_request_among_good_ones(server):
    """Every client has its own response, batched by Triton or not."""

    def client(index):
        side = 4097 if index == 3 else 64
        try:
            return ask(server, np.zeros((1, side, 4096 if index == 3 else 64, 3), np.uint8))["logits"].shape
        except InferenceServerException as error:
            return error.message().partition(";")[0]

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(client, range(8))]
    assert answers.pop(3) == "an image of 4096x4097 pixels"
    assert answers == [(1, 10)] * 7


def test_garbage_is_refused(server):
    """Malformed requests, or data that does not fit the shape."""
    shape = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3]}
    short = json.dumps({"inputs": [shape | {"parameters": {"binary_data_size": 10}}]}).encode()
    bodies = [
        (b"{", {}),
        (json.dumps({"inputs": [shape | {"data": [1, 2, 3]}]}).encode(), {}),
        (json.dumps({"inputs": [shape | {"shape": [1, -8, -8, 3], "data": [1] * 192}]}).encode(), {}),
        (short + bytes(10), {"Inference-Header-Content-Length": str(len(short))}),
        (short, {"Inference-Header-Content-Length": "99999999"}),
    ]
    for body, headers in bodies:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/infer", body, headers), timeout=10)
        assert refused.value.code in (400, 500)
        alive(server)
    for port in server.ports.values():
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(np.random.default_rng(0).bytes(1 << 16))
        alive(server)


def test_the_server_listens_on_this_machine_alone(server):
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    listening = [address for _, address, _, state, *_ in rows if state == "0A"]
    for port in server.ports.values():
        (found,) = {address for address in listening if address.endswith(f":{port:04X}")}
        assert found.endswith(f"0100007F:{port:04X}")  # 127.0.0.1, as either family has it
