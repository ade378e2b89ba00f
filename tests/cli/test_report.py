"""`validate parity --report`: one page, compared with the JSON report and rendered in a browser."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import load
from onnx.external_data_helper import ExternalDataInfo
from PIL import Image

from infexport.bundle.integrity import sealed, sha256
from infexport.inference.centrality import Centrality
from infexport.outputs.heatmaps import overlay
from infexport.system import dependencies

NASTY = "<script>alert(1)</script>"
INLINE = {"span", "data", "strong", "code"}
VOID = {"meta", "br", "img", "link", "hr", "input"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(html.parser.HTMLParser):
    """Parsed page: attributes of every element, its text, and whether every element is closed."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text("utf-8")
        self.open, self.elements, self.words = [], [], []
        self.feed(self.source)
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.words.append("" if tag in INLINE else " ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def values(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def spoil(bundle, name):
    """Reverse a weight of the bundle; every shape stays the same."""
    tensor = next(t for t in load(bundle / "model.onnx", load_external_data=False).graph.initializer if t.name == name)
    place = ExternalDataInfo(tensor)
    data = np.memmap(bundle / place.location, np.float32, "r+", place.offset, tuple(tensor.dims))
    data[:] = data[::-1].copy()
    data.flush()


@pytest.fixture(scope="module")
def judged(infexport, golden_bundle, golden_images, tmp_path_factory):
    """Name → page and JSON document of the same comparison, one that passes and one that fails."""
    folder = tmp_path_factory.mktemp("report")
    broken = shutil.copytree(golden_bundle("reference_linear"), folder / "broken")
    spoil(broken, "network.encoder.layers.1.layer.ff.0.bias")
    images, _ = golden_images("reference_linear")
    arguments = ("--sizes", "32,16x40", "--images", images, "--layers", "--json", "--report")

    def judge(bundle, file, *more, exit_code=0):
        done = infexport("validate", "parity", bundle, *arguments, file, *more, exit_code=exit_code)
        return Page(file), json.loads(done.stdout)

    return {
        "passing": judge(golden_bundle("reference_linear"), folder / "passing.html"),
        "failing": judge(broken, folder / "failing.html", "--no-verify", exit_code=1),
    }


@pytest.mark.parametrize("name", ["passing", "failing"])
def test_it_is_one_whole_page_that_loads_nothing(name, judged):
    page, _ = judged[name]
    assert page.open == []
    assert len(page.source) < 1_000_000
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page.source)
    assert all(address.startswith(("data:image/", "#")) for at in ("src", "href") for address in page.values(at))
    assert "default-src 'none'" in page.source
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)) | set(page.values("aria-labelledby"))
    assert referred <= set(ids)
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    drawn = [attributes for tag, attributes in page.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawn) == 2 + 2 * 4  # over all inputs, and over the layers for four of the five
    assert all(attributes["aria-label"] for attributes in drawn)


@pytest.mark.parametrize("name", ["passing", "failing"])
def test_its_numbers_are_those_of_the_document(name, judged):
    page, document = judged[name]
    numbers = {float(value) for tag, attributes in page.elements if tag == "data" for value in [attributes["value"]]}
    cases = document["cases"]
    assert len(cases) == 5
    for case in cases:
        assert {case["bundle"]["relative"], case["bundle"]["max_abs"], case["torch_float32"]["relative"]} <= numbers
    first = cases[0]["layers"]
    found = {part[key] for part in first for key in ("total", "torch_adds", "torch_total")}
    found |= {
        value for part in first for error in [part["output"], *part["states"].values()] for value in error.values()
    }
    assert found <= numbers
    assert f"tolerance {document['tolerance']['relative']:.1e}" in page.text


def test_a_passing_one(judged, golden_bundle):
    page, document = judged["passing"]
    assert f"<title>parity holds: {golden_bundle('reference_linear').name}</title>" in page.source
    assert "✓ ok" in page.text
    assert "✗" not in page.text
    assert "unverified" not in page.text
    assert document["compared"].endswith("not with the code that trained them")
    assert f"compared {document['compared']} judged by" in page.text
    worst = max(case["bundle"]["relative"] for case in document["cases"])
    assert f"The largest relative error is {worst:.1e}, at" in page.text
    assert "parts within budget 20 of 20" in page.text
    assert page.text.count("× average") == 4
    assert "No heat map" not in page.text
    command = "infexport validate parity "
    assert command + str(golden_bundle("reference_linear")) + " --sizes 32,16x40 --images" in page.text
    manifest = json.loads((golden_bundle("reference_linear") / "infexport.json").read_text())
    for digest in [*manifest["files"].values(), *manifest["checkpoint"]["files"].values()]:
        assert digest in page.text
    assert "linear_infsa" in page.text
    for name in ("Python 3.", "torch 2.", "onnxruntime 1.", "numpy 2.", " UTC"):
        assert name in page.text


def test_a_failing_one(judged):
    page, document = judged["failing"]
    assert "<title>parity FAILED (unverified: the bundle was modified): broken</title>" in page.source
    assert "Parity FAILED ⚠ unverified" in page.text
    assert "layers.1" in document["culprit"]
    assert document["culprit"][1:] in page.text
    assert "32x32 ✗ layers.1 is out of its budget" in page.text
    data = re.search(r"model\.onnx\.data ✗ changed (\w{64}) now (\w{64})", page.text)
    assert data is not None
    assert data[2] == sha256(Path(document["bundle"]) / "model.onnx.data")


def test_what_is_the_users_is_escaped(infexport, golden_bundle, golden_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = shutil.copytree(golden_bundle("reference_linear"), tmp_path / "b<i>")
    (bundle / "labels.json").write_text(json.dumps([NASTY] * 10))
    manifest = json.loads((bundle / "infexport.json").read_text())
    manifest["files"]["labels.json"] = sha256(bundle / "labels.json")
    (bundle / "infexport.json").write_bytes(sealed(manifest))
    images, _ = golden_images("reference_linear")
    folder = tmp_path / "images<script>"
    folder.mkdir()
    shutil.copy(images / "0.png", folder / "<img src=x onerror=alert(1)>&amp;$a_1$.png")
    (folder / "<b>no image.png").write_text("no image")
    arguments = ("validate", "parity", bundle, "--images", folder, "--report", "r/page.html")
    infexport(*arguments, exit_code=1)
    page = Page(tmp_path / "r" / "page.html")
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "b", "i"}
    assert not page.values("onerror")
    assert NASTY in page.text
    assert "<img src=x onerror=alert(1)>&amp;$a_1$.png" in page.text
    assert "Not compared" in page.text
    assert "<b>no image.png" in page.text
    assert "1 input could not be compared; of the others" in page.text
    assert "'" in re.search(r"infexport validate parity .*?page\.html", page.text)[0]  # a shell would expand it


def test_an_answer_that_is_not_finite(infexport, golden_bundle, tmp_path):
    bundle = shutil.copytree(golden_bundle("reference_linear"), tmp_path / "b")
    data = bundle / "model.onnx.data"
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    arguments = ("validate", "parity", bundle, "--sizes", "32", "--no-verify", "--report", tmp_path / "page.html")
    infexport(*arguments, exit_code=1)
    page = Page(tmp_path / "page.html")
    assert "At 32x32 the bundle's answer is not finite." in page.text
    assert "No heat map: its centrality is not finite" in page.text


def test_a_bundle_without_centrality_or_many_tokens(infexport, golden_bundle, tmp_path):
    bundle = shutil.copytree(golden_bundle("reference_linear"), tmp_path / "b")
    arguments = ("validate", "parity", bundle, "--report", tmp_path / "page.html", "--sizes")
    infexport(*arguments, "520x536")  # more tokens than are run whole
    page = Page(tmp_path / "page.html")
    assert "synthetic image" in page.text
    assert "× average" in page.text
    (bundle / "centrality.onnx").unlink()
    manifest = json.loads((bundle / "infexport.json").read_text())
    del manifest["files"]["centrality.onnx"]
    (bundle / "infexport.json").write_bytes(sealed(manifest))
    infexport(*arguments, "32")
    assert "No heat map: this bundle does not give centrality." in Page(tmp_path / "page.html").text


def test_another_checkpoint_is_named_and_hashed(infexport, golden_bundle, tmp_path):
    bundle = golden_bundle("reference_linear")
    recorded = json.loads((bundle / "infexport.json").read_text())["checkpoint"]["path"]
    other = shutil.copy(recorded, tmp_path / "other.safetensors")
    arguments = ("validate", "parity", bundle, "--sizes", "32", "--report", tmp_path / "page.html")
    infexport(*arguments, "--checkpoint", other)
    page = Page(tmp_path / "page.html")
    assert f"judged by {other}" in page.text
    assert f"{other} (checkpoint) not recorded {sha256(other)}" in page.text


def test_it_is_refused_before_the_work(infexport, golden_bundle, tmp_path, monkeypatch):
    arguments = ("validate", "parity", golden_bundle("reference_linear"), "--report")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("infexport.evaluation.parity.validate.validate", lambda *_: pytest.fail("work was begun"))
    for name, words in (("page.pdf", "expected .html"), ("file/page.html", "cannot write the report")):
        assert words in infexport(*arguments, tmp_path / name, exit_code=2).stderr
    monkeypatch.setattr(dependencies, "installed", lambda module: module not in ("jinja2", "matplotlib"))
    assert "infexport[plot]" in infexport(*arguments, tmp_path / "page.html", exit_code=2).stderr
    assert not (tmp_path / "page.html").exists()


def test_a_map_lies_where_its_patches_are():
    tokens = np.zeros((1, 1, 2, 3), np.float32)
    tokens[..., 1, 2] = 1
    grey = np.full((20, 30, 3), 100, np.uint8)
    mixed, top = overlay(Centrality(tokens, np.zeros((1, 1), np.float32), (2, 3), 1), grey)
    assert top == 6
    bright = (mixed == mixed[-1, -1]).all(-1)
    assert bright[10:, 20:].all()
    assert bright.sum() == 100
    # cells of two patches, the last cell of one
    cells = np.array([[[[0, 1]]]], np.float32)
    mixed, top = overlay(Centrality(cells, np.zeros((1, 1), np.float32), (2, 3), 2), grey)
    assert top == 3
    bright = (mixed == mixed[-1, -1]).all(-1)
    assert bright[:, 20:].all()
    assert bright.sum() == 200


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Run headless Chromium; return its output and its console messages."""
    if BROWSER is None:
        if os.environ.get("CI"):
            pytest.fail("there must be a Chromium: .ci/run installs it")
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("chromium")

    def run(page, *options):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--hide-scrollbars", "--enable-logging=stderr", "--allow-file-access-from-files"]
        command += [f"--user-data-dir={folder}", *options, page.as_uri()]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.mark.parametrize("name", ["passing", "failing"])
def test_a_browser_shows_it(name, judged, browse, tmp_path):
    file = tmp_path / f"{name}.html"
    file.write_text(judged[name][0].source)
    dom, console = browse(file, "--dump-dom")
    assert console == []
    assert {"passing": "Parity holds</h1>", "failing": "Parity FAILED</h1>"}[name] in dom
    for theme, scheme in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{theme}.png"
        shown = (f"--screenshot={picture}", "--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}")
        assert browse(file, *shown)[1] == []
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert (pixels[450, 20].mean() > 128) == (theme == "light")
        red, green, _ = np.moveaxis(pixels[30:260, 150:700], -1, 0)
        coloured = red - green > 50 if name == "failing" else green - red > 50
        assert coloured.sum() > 2000  # the seal and the text next to it


def test_a_telephone_does_not_scroll_sideways(judged, browse, tmp_path):
    (tmp_path / "page.html").write_text(judged["failing"][0].source)
    (tmp_path / "frame.html").write_text(
        '<iframe id="f" style="width:360px;height:800px;border:0" src="page.html"></iframe><script>f.onload = () => '
        "{ document.title = f.contentDocument.documentElement.scrollWidth <= 360 ? 'fits' : 'scrolls' }</script>"
    )
    assert "<title>fits</title>" in browse(tmp_path / "frame.html", "--dump-dom")[0]


def test_paper_has_what_is_folded_away(judged, browse, tmp_path):
    """The printed page includes elements that are collapsed on the screen."""
    source = judged["passing"][0].source
    sizes = []
    for text in (source, source.replace("details::details-content", "details::nothing")):
        (tmp_path / "page.html").write_text(text)
        browse(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
        sizes.append((tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n"))
    assert sizes[0] > sizes[1]
