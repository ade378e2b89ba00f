"""Images by URL."""

from __future__ import annotations

import json
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from PIL import Image
from support import ZOO

from infexport import Predictor
from infexport.errors import InfexportError
from infexport.images.decode import read_image
from infexport.images.fetch import find, local_copy

DIGITS = ZOO / "digits-held-out"
FILES = sorted(DIGITS.glob("*.png"))[:3]


class Handler(SimpleHTTPRequestHandler):
    """A folder, one part of which needs a password."""

    def do_GET(self):
        if self.path.startswith("/private"):
            self.send_error(403)
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=DIGITS)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def bucket():
    """A store that has no file system's folders: digits, and what is not to be found."""
    files = fsspec.filesystem("memory")
    for index, file in enumerate(FILES):
        files.pipe(f"/bucket/deep/{index}/{file.name}", file.read_bytes())
    files.pipe("/bucket/deep/notes.txt", b"")
    files.pipe("/bucket/.hidden/a.png", b"")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_folder_s_images_are_found(bucket):
    expected = [f"{bucket}/deep/{index}/{file.name}" for index, file in enumerate(FILES)]
    assert find([bucket]) == expected
    assert find([f"{bucket}/deep/"]) == expected
    assert find([expected[1], bucket, FILES[0], expected[1]]) == [expected[1], expected[0], expected[2], FILES[0]]


def test_run_engine_takes_urls(infexport, zoo_bundle, server, bucket, tmp_path):
    bundle = zoo_bundle("digits-linear")
    urls = [f"{server}/{FILES[0].name}", f"{bucket}/deep/1/{FILES[1].name}", f"file://{FILES[2]}"]
    maps = tmp_path / "maps"
    infexport("run-engine", bundle, *FILES, "-o", tmp_path / "files.npz")
    infexport("run-engine", bundle, *urls, "-o", tmp_path / "urls.npz", "--heatmaps", maps)
    with np.load(tmp_path / "files.npz") as expected, np.load(tmp_path / "urls.npz") as found:
        assert np.array_equal(found["logits"], expected["logits"])
        assert found["files"].tolist() == urls
    assert [file.name for file in sorted(maps.iterdir())] == [file.name for file in FILES]


def test_a_large_one_is_streamed_from_a_copy(zoo_bundle, bucket):
    image = np.tile(np.array(Image.open(FILES[0]).convert("RGB")), (10, 10, 1))
    with fsspec.open(f"{bucket}/large.png", "wb") as file:
        Image.fromarray(image).save(file, format="PNG")
    predictor = Predictor(zoo_bundle("digits-linear"), size="native", execution="stream")
    found = predictor([f"{bucket}/large.png", image])
    assert found["execution"][0] == "stream, tokens in memory"
    assert np.array_equal(*found["logits"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{server}/private/a.png", "403"),
        ("{server}/gone.png", "FileNotFoundError"),
        ("http://127.0.0.1:1/a.png", "127.0.0.1"),
        ("nonsense://a/b.png", "Protocol not known: nonsense"),
        ("s3://bucket/a.png", "s3fs"),
        ("memory://nowhere/a.png", "FileNotFoundError"),
    ],
)
def test_what_cannot_be_fetched(url, words, infexport, zoo_bundle, server):
    url = url.format(server=server)
    with pytest.raises(InfexportError, match="cannot read") as caught, local_copy(url):
        pass
    assert url in caught.value.summary
    assert words in caught.value.details
    assert caught.value.hint
    found = Predictor(zoo_bundle("digits-linear"))([url, FILES[0]])
    assert found["error"][0] == caught.value.summary
    assert found["label"][1] == FILES[0].name[0]


def test_without_rights_the_command_says_so(infexport, zoo_bundle, server):
    result = infexport("run-engine", zoo_bundle("digits-linear"), f"{server}/private/a.png", "--json", exit_code=2)
    assert f"error: cannot read {server}/private/a.png" in result.stderr
    assert "403" in result.stderr
    assert "credentials" in result.stderr


def test_one_that_goes_away_is_one_failure(infexport, zoo_bundle, server, bucket, monkeypatch):
    """Between being found and being fetched."""
    from infexport.images import fetch

    monkeypatch.setattr(fetch, "find_urls", lambda url: [url])
    urls = [f"{bucket}/deep/gone.png", f"{server}/{FILES[0].name}"]
    result = infexport("run-engine", zoo_bundle("digits-linear"), *urls, "--json", exit_code=1)
    document = json.loads(result.stdout)
    assert [failed["file"] for failed in document["failed"]] == urls[:1]
    assert [image["file"] for image in document["images"]] == urls[1:]


def test_what_may_be_secret_is_not_told(infexport, zoo_bundle, server, tmp_path):
    place = server.removeprefix("http://")
    good, bad = (f"http://user:hunter2@{place}/{name}?signature=SECRET" for name in (FILES[0].name, "private/a.png"))
    found = Predictor(zoo_bundle("digits-linear"))([good, bad])
    told = json.dumps({name: values.tolist() for name, values in found.items() if values.dtype.kind == "U"})
    assert found["label"][0] == FILES[0].name[0]
    assert found["error"].tolist() == ["", f"cannot read http://{place}/private/a.png"]
    assert "hunter2" not in told
    assert "SECRET" not in told
    result = infexport("run-engine", zoo_bundle("digits-linear"), bad, exit_code=2)
    assert "hunter2" not in result.stderr
    infexport("run-engine", zoo_bundle("digits-linear"), good, "--heatmaps", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILES[0].name]


def test_pages_are_not_followed(server):
    """A server of pages lists links, and these have links."""
    assert find([f"{server}/"]) == [f"{server}/"]
    with local_copy(f"{server}/") as file, pytest.raises(InfexportError, match="not an image that can be read"):
        read_image(file)


def test_images_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(FILES[0], f"deep/{FILES[0].name}")
    url = f"zip://deep/{FILES[0].name}::file://{tmp_path}/all.zip"
    assert find([url]) == [url]
    with local_copy(url) as file:
        assert file.read_bytes() == FILES[0].read_bytes()
        assert file.suffix == ".png"
    with pytest.raises(InfexportError, match="a folder in an archive"):
        find([f"zip://deep::file://{tmp_path}/all.zip"])


def test_an_interrupted_run_of_a_url_goes_on(zoo_bundle, bucket, tmp_path):
    """The folder of its tokens is that of the URL and its content, not of the copy."""
    from infexport.inference.streaming import resume

    image = f"{bucket}/deep/0/{FILES[0].name}"
    names = []
    enter = resume.Scratch.__enter__

    def entered(self):
        enter(self)
        names.append(self.folder.name)
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Scratch, "__enter__", entered)
        with Predictor(zoo_bundle("digits-linear"), size="native", execution="stream", scratch=tmp_path) as predictor:
            predictor([image, image, f"{bucket}/deep/1/{FILES[1].name}"])
    assert names[0] == names[1] != names[2]


def test_a_folder_without_images():
    fsspec.filesystem("memory").pipe("/empty/notes.txt", b"")
    with pytest.raises(InfexportError, match="no images in folder"):
        find(["memory://empty"])


@pytest.mark.parametrize("execution", ["whole", "stream"])
def test_a_damaged_one_is_named_by_its_url(zoo_bundle, tmp_path, execution):
    """Not by the copy that was read; damage that is found while streaming, too."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("bad.png", content[: len(content) // 2])
    url = f"zip://bad.png::file://{tmp_path}/all.zip"
    predictor = Predictor(zoo_bundle("digits-linear"), size="native", execution=execution)
    (failure,) = predictor.predict([url])
    assert url in failure.error.summary
    assert "/infexport-" not in json.dumps(failure.to_dict())
