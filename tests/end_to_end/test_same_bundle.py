"""A file converted twice gives the same bundle: no order depends on hashes, addresses or folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import onnx
import pytest
from support import GOLDEN

from infexport.bundle import open_bundle
from infexport.bundle.integrity import sealed

BUNDLES = [("reference_linear", ()), ("torchvision_pure", ("--neumann-terms", "3"))]


@pytest.mark.parametrize(("name", "options"), BUNDLES)
def test_two_conversions_are_one_bundle(golden_bundle, tmp_path, name, options):
    """Convert a copy in another folder, in another process with another seed of string hashes."""
    here = golden_bundle(name, *options)
    for suffix in ("safetensors", "json"):
        shutil.copy(GOLDEN / f"{name}.{suffix}", tmp_path)
    command = [sys.executable, "-m", "infexport", "convert", "checkpoint", f"{name}.safetensors"]
    subprocess.run(
        [*command, "--config", f"{name}.json", *options, "-o", "bundle"],
        cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "3"}, check=True, capture_output=True,
    )  # fmt: skip
    there = tmp_path / "bundle"
    assert {file.name for file in there.iterdir()} == {file.name for file in here.iterdir()}
    assert [file.name for file in there.glob("*.onnx*") if file.read_bytes() != (here / file.name).read_bytes()] == []
    first, second = (json.loads((bundle / "infexport.json").read_text()) for bundle in (here, there))
    assert first["digest"] == second["digest"]
    assert {key for key in first if first[key] != second[key]} == {"checkpoint", "seal"}
    assert first["checkpoint"]["files"] == second["checkpoint"]["files"]


@pytest.mark.parametrize(("name", "options"), BUNDLES)
def test_graphs_hold_none_of_the_exporter_s_notes(golden_bundle, name, options):
    for file in golden_bundle(name, *options).glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        graphs = [model.graph, *model.functions]
        parts = [part for graph in graphs for part in (graph, *graph.node, *graph.value_info)]
        parts += [model, *model.graph.input, *model.graph.output, *model.graph.initializer]
        assert not any(part.metadata_props or part.doc_string for part in parts), file.name
        assert b"pkg." not in file.read_bytes(), file.name


def test_the_folder_of_the_checkpoint_is_sealed_and_not_in_the_digest(golden_bundle):
    manifest = json.loads((golden_bundle("reference_linear") / "infexport.json").read_text())
    moved = manifest | {"checkpoint": manifest["checkpoint"] | {"path": "/elsewhere/model.safetensors"}}
    again = json.loads(sealed(moved))
    assert again["digest"] == manifest["digest"] == open_bundle(golden_bundle("reference_linear")).manifest.digest
    assert again["seal"] != manifest["seal"]
    other = json.loads(sealed(manifest | {"parameters": 1}))
    assert other["digest"] != manifest["digest"]
