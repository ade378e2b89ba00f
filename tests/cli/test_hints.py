"""Hints name options of the command, and values that it accepts."""

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import infexport
from infexport.bundle.engine_record import ShapeRange
from infexport.cli import cli
from infexport.cli.options import Bytes, Numbers, Sizes
from infexport.conversion.tensorrt.build_worker import Builder
from infexport.conversion.tensorrt.profiles import check_stages, check_whole, make_profile, peak
from infexport.errors import InfexportError
from infexport.inference.runners.tensorrt import EngineSession
from infexport.system.gpus import TARGETS, Target
from infexport.system.progress import ProgressListener
from infvit.stage_scope import StageScope

PACKAGE = Path(infexport.__file__).parent
PARITY, ACCURACY, CENTRALITY = "validate parity", "validate accuracy", "validate centrality"
COMMANDS = {
    "conversion/tensorrt/profiles": ["build-engine"],
    "conversion/tensorrt/build": ["build-engine"],
    "conversion/tensorrt/build_worker": ["build-engine"],
    "inference/engine_selection": ["run-engine", PARITY, ACCURACY, "benchmark", "inspect"],
    "inference/runners/tensorrt": [
        "run-engine",
        ACCURACY,
    ],  # other commands give engines at most the tokens that they were built for
    "inference/runners/onnxruntime": ["run-engine", PARITY, ACCURACY, "benchmark"],
    "evaluation/pytorch_reference": [PARITY, ACCURACY],
    "evaluation/recorded_checkpoint": [PARITY, ACCURACY, CENTRALITY],
    "evaluation/centrality/check": [CENTRALITY],
    "evaluation/parity/tracing": [PARITY],
    "evaluation/parity/validate": [PARITY],
    "evaluation/report/page": [PARITY],
    "evaluation/accuracy/dataset": [ACCURACY],
    "evaluation/accuracy/evaluate": [ACCURACY],
    "cli/commands/accuracy": [ACCURACY],
}
"""Module → commands that can show its errors."""


def options_of(command):
    found = cli
    for name in command.split():
        found = found.commands[name]
    return {
        name
        for parameter in found.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts + parameter.secondary_opts
    }


def hints_of(module):
    """Words of every hint that is a constant in a module."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        found = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InfexportError":
            found = node.args[2:3] + [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("hint", "remedies", "ELSEWHERE"):
            found = [node.value]
        elif isinstance(node, ast.FunctionDef) and node.name in ("_remedy", "_room"):
            found = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
        for part in found:
            yield "".join(leaf.value for leaf in ast.walk(part) if isinstance(getattr(leaf, "value", None), str))


@pytest.mark.parametrize("module", COMMANDS)
def test_a_hint_names_options_that_its_commands_have(module):
    for hint in hints_of(module):
        # options of another command must exist there
        other = "convert checkpoint" if "convert the checkpoint" in hint else ""
        for option in re.findall(r"--[a-z][a-z0-9-]*", hint):
            for command in [other] if other and option in options_of(other) else COMMANDS[module]:
                assert option in options_of(command), (hint, option, command)


@st.composite
def manifests(draw):
    width = 8 * draw(st.integers(1, 128))
    config = {
        "embed_dim": width,
        "mlp_dim": width * draw(st.integers(1, 4)),
        "patch_size": draw(st.sampled_from([4, 8, 16, 32])),
        "num_heads": draw(st.sampled_from([1, 4, 8])),
        "image_size": 224,
        "variant": draw(st.sampled_from(["linear_infsa", "pure_infsa"])),
    }
    overs = ["image", "tokens", "nothing", *(["pairs"] if config["variant"] == "pure_infsa" else [])]
    config = SimpleNamespace(**config)
    stages = [SimpleNamespace(graph=over, over=StageScope(over)) for over in overs]
    return SimpleNamespace(config=config, input="uint8", stages=draw(st.sampled_from([stages, None])))


def applied(remedy):
    """Parse the options of a hint as the command line does; of several possible GPUs the first."""
    found = dict(re.findall(r"(--[a-z]+) (\S*\w)", remedy))
    read = {"--sizes": Sizes(), "--batch": Numbers(), "--memory": Bytes(), "--chunk": click.IntRange(min=1)}
    values = {name: read[name].convert(value, None, None) for name, value in found.items() if name in read}
    if found.get("--target", "local") != "local":
        values["--target"] = TARGETS[found["--target"]]
    if "without --memory" in remedy:
        values["--memory"] = None
    return values


def hint_of(check, *arguments):
    """The hint of an error; empty if there is no error."""
    try:
        check(*arguments)
    except InfexportError as error:
        return error.hint
    return ""


MEMORY = st.none() | st.integers(2**20, 2**38)


@settings(max_examples=200, deadline=None)
@given(
    manifest=manifests(),
    memory=MEMORY,
    room=MEMORY,
    weights=st.integers(0, 2**39),
    sides=st.lists(st.tuples(*[st.integers(1, 4000)] * 2), min_size=1, max_size=3),
    batches=st.lists(st.integers(1, 64), min_size=1, max_size=3),
)
def test_what_is_hinted_for_a_whole_graph_is_accepted(manifest, memory, room, weights, sides, batches):
    patch, batches = manifest.config.patch_size, sorted(batches)
    sizes = [(height * patch, width * patch) for height, width in sides]
    disorder = hint_of(make_profile, manifest, sizes, batches)
    profile = make_profile(manifest, applied(disorder)["--sizes"] if disorder else sizes, batches)
    target = Target("some", "8.0", room)
    for remedy in filter(None, hint_of(check_whole, manifest, profile, target, weights, memory).split("; or ")):
        if remedy.startswith("no GPU"):
            assert peak(manifest, weights, 1, 2) > max(each.memory for each in TARGETS.values())
            continue
        found = applied(remedy)
        assert found, remedy
        given_memory, aim = found.get("--memory", memory), found.get("--target", target)
        if "--chunk" in found:
            check_stages(manifest, found["--chunk"], aim, weights, given_memory)
        else:
            sizes, counts = found.get("--sizes", [*profile.sizes]), found.get("--batch", [*profile.batches])
            check_whole(manifest, make_profile(manifest, sizes, counts), aim, weights, given_memory)


@settings(max_examples=200, deadline=None)
@given(
    manifest=manifests(),
    memory=MEMORY,
    room=MEMORY,
    weights=st.integers(0, 2**39),
    chunk=st.integers(1, 2**28),
)
def test_what_is_hinted_for_stages_is_accepted(manifest, memory, room, weights, chunk):
    assume(manifest.stages)
    target = Target("some", "8.0", room)
    hint = hint_of(check_stages, manifest, chunk, target, weights, memory)
    found = applied(hint)
    given_memory, aim = found.get("--memory", memory), found.get("--target", target)
    if "no GPU" in hint:
        largest = max(TARGETS.values(), key=lambda each: each.memory or 0)
        assert hint_of(check_stages, manifest, 1, largest, weights)
    elif hint:
        assert found["--chunk"] < chunk or aim is not target or given_memory != memory
        check_stages(manifest, found["--chunk"], aim, weights, given_memory)


def test_no_chunk_is_hinted_that_was_refused():
    config = {"embed_dim": 8, "mlp_dim": 8, "patch_size": 8, "num_heads": 1, "variant": "linear_infsa"}
    manifest = SimpleNamespace(
        config=SimpleNamespace(**config), stages=[SimpleNamespace(graph="a", over=StageScope.TOKENS)]
    )
    with pytest.raises(InfexportError, match="--chunk 1 is too large") as refused:
        check_stages(manifest, 1, TARGETS["t4"], weights=2**34)
    assert "a chunk that fits" not in refused.value.hint
    assert "--target" in refused.value.hint


@pytest.mark.parametrize(
    ("sizes", "batches"), [([(8, 16), (33, 40), (64, 64)], None), ([(64, 8), (8, 64)], None), (None, [4, 2, 8])]
)
def test_a_profile_in_disorder_names_one_in_order(sizes, batches):
    manifest = SimpleNamespace(config=SimpleNamespace(image_size=64, patch_size=8))
    with pytest.raises(InfexportError) as refused:
        make_profile(manifest, sizes, batches)
    found = applied(refused.value.hint)
    make_profile(manifest, found.get("--sizes", sizes), found.get("--batch", batches))


@given(
    shapes=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    name=st.sampled_from(["image", "pixels"]),
    stages=st.booleans(),
)
def test_an_engine_that_is_to_be_built_takes_what_was_given(shapes, name, stages):
    """The command in the hint, parsed by `build-engine`, gives a profile that contains the input."""
    low, best, high = ([1, 16, 16, 3], [2, 32, 32, 3], [4, 64, 64, 3])
    given_shape = [shapes[0], 8 * shapes[1], 8 * shapes[2], 3]
    if name == "pixels":
        low, best, high, given_shape = ([s[0], 3, s[1], s[2]] for s in (low, best, high, given_shape))
    record = SimpleNamespace(chunk=None, precision="fp32", profile={name: ShapeRange(low, best, high)})
    session = EngineSession.__new__(EngineSession)
    session._bundle, session._file, session._record, session._stages = Path("b"), "a.engine", record, stages
    if hint := hint_of(session._check, {name: np.broadcast_to(np.uint8(0), given_shape)}):
        whole, _, stream = hint.partition("; or for images of any size: ")
        assert stream.endswith("--execution stream") == stages
        found = applied(whole)
        manifest = SimpleNamespace(config=SimpleNamespace(image_size=64, patch_size=8))
        profile = make_profile(manifest, found["--sizes"], found["--batch"])
        takes = "uint8" if name == "image" else "float32"
        record.profile = profile.shapes(takes)
        session._check({name: np.broadcast_to(np.uint8(0), given_shape)})


def test_a_stage_is_given_the_tokens_that_its_engine_takes():
    shapes = ShapeRange([1, 1, 8], [1, 32, 8], [1, 32, 8])
    record = SimpleNamespace(chunk=32, precision="fp32", profile={"tokens": shapes})
    session = EngineSession.__new__(EngineSession)
    session._bundle, session._file, session._record, session._stages = Path("b"), "a", record, True
    with pytest.raises(InfexportError) as refused:
        session._check({"tokens": np.zeros((1, 33, 8))})
    session._check({"tokens": np.zeros((1, applied(refused.value.hint)["--chunk"], 8))})


@pytest.mark.parametrize("options", ["smaller --sizes or --batch", "a smaller --chunk"])
def test_a_build_that_fails_names_the_options_of_its_kind(options, tmp_path):
    made = SimpleNamespace(num_layers=0)
    parser = SimpleNamespace(parse_from_file=lambda file: True)
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0), OnnxParser=lambda network, log: parser
    )
    builder = Builder.__new__(Builder)
    builder.trt, builder._backend = trt, SimpleNamespace(name="tensorrt")
    builder._log = SimpleNamespace(take=list)
    builder._builder = SimpleNamespace(
        create_network=lambda flags: made, build_serialized_network=lambda network, config: None
    )
    builder._config = lambda network, profile: None
    with pytest.raises(InfexportError, match="could not build x") as refused:
        builder.build("x", tmp_path / "a.onnx", tmp_path / "a.engine", {}, options)
    assert refused.value.hint == f"try {options}"


def test_a_plan_says_which_options_make_it_smaller(monkeypatch, tmp_path):
    from infexport.conversion.tensorrt import build

    asked = {}
    monkeypatch.setattr(build, "ask", lambda worker, request, heard: asked.update(request) or {"version": "1"})
    manifest = SimpleNamespace(files={})
    profile = make_profile(SimpleNamespace(config=SimpleNamespace(image_size=64, patch_size=8)), None, None)
    plan = build.Plan(TARGETS["a100"], SimpleNamespace(name="tensorrt"), "fp32", "whole", profile, None)
    for execution, option in (("whole", "--sizes"), ("stream", "--chunk")):
        bundle = SimpleNamespace(path=tmp_path, manifest=manifest)
        build._build(bundle, dataclasses.replace(plan, execution=execution), [], tmp_path, ProgressListener())
        assert option in asked["options"]
