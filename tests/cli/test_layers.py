"""`validate parity --layers`: correct models pass, and a fault is located in its layer."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from support import ZOO

SIZES = "32,104"


def judged(infexport, bundle, *options, sizes=SIZES, exit_code=0):
    arguments = ("validate", "parity", bundle, "--layers", "--sizes", sizes, "--json", *options)
    return json.loads(infexport(*arguments, exit_code=exit_code).stdout)


@pytest.mark.parametrize("execution", ["whole", "stream"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits-linear", ()),
        ("digits-linear", ("--precision", "fp16")),
        ("digits-linear", ("--precision", "int8")),
        ("digits-linear", ("--input", "float32")),
        ("digits-pure", ()),
        ("digits-pure", ("--precision", "fp16")),
        ("digits-pure", ("--precision", "int8")),
        ("digits-pure", ("--neumann-terms", "3")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_an_unharmed_bundle_keeps_its_budgets(name, options, execution, infexport, zoo_bundle):
    report = judged(infexport, zoo_bundle(name, *options), "--execution", execution)
    assert report["passed"] is True
    assert report["culprit"] == ""
    for case in report["cases"]:
        assert [part["name"] for part in case["layers"]] == ["embed", *(f"layers.{i}" for i in range(4)), "head"]
        for part in case["layers"][1:-1]:
            assert part["states"]
            # the budget is tight: a small multiple of the actual error, not an unreachable bound
            assert 0.02 * part["output"]["budget"] < part["output"]["adds"] <= 0.6 * part["output"]["budget"]


@pytest.mark.parametrize("calibrate", [(), ("--calibrate", ZOO / "digits-held-out")], ids=["dynamic", "calibrated"])
@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_single_images_in_int8(name, calibrate, infexport, zoo_bundle):
    """Model whose last part is one token, whose error has few components."""
    bundle = zoo_bundle(name, "--precision", "int8", *calibrate)
    arguments = ("validate", "parity", bundle, "--layers", "--images", ZOO / "digits-held-out", "--json")
    report = json.loads(infexport(*arguments).stdout)
    assert len(report["cases"]) == 20
    shares = [part["output"]["adds"] / part["output"]["budget"] for case in report["cases"] for part in case["layers"]]
    assert max(shares) < 0.9
    assert 0.1 < np.median(shares) < 0.3


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_not_folded(name, infexport, zoo_bundle):
    report = judged(infexport, zoo_bundle(name, "--no-fold"))
    assert report["passed"] is True
    assert all(part["states"] for part in report["cases"][0]["layers"][1:-1])


def test_every_state_of_linear_is_compared(infexport, zoo_bundle):
    sums = {"energy.mass", "energy.moment", "score.mass", "score.moment"}
    for execution, names in (("whole", sums | {"scores"}), ("stream", sums)):
        report = judged(infexport, zoo_bundle("digits-linear"), "--execution", execution, sizes="32")
        assert all(set(part["states"]) == names for part in report["cases"][0]["layers"][1:-1])


def copied(bundle, tmp_path):
    """A copy of a bundle and its graph, for tests that damage it."""
    shutil.copytree(bundle, tmp_path / "harmed")
    return tmp_path / "harmed", onnx.load(tmp_path / "harmed" / "model.onnx")


def layer_nodes(model, layer, kind):
    """Nodes of a type between the input of a layer and the input of the next."""
    names = [output for node in model.graph.node for output in node.output]
    nodes = list(model.graph.node)
    made = {output: i for i, node in enumerate(nodes) for output in node.output}
    assert f"layers.{layer}.tokens" in names
    first, last = made[f"layers.{layer}.tokens"], made.get(f"layers.{layer + 1}.tokens", len(nodes))
    return [node for node in nodes[first + 1 : last + 1] if node.op_type == kind]


def transpose_a_weight(model, layer):
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in layer_nodes(model, layer, "MatMul"):
        weight = initializers.get(node.input[1])
        if weight is not None and list(weight.dims) == [128, 128]:
            array = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array.T), weight.name))
            return
    raise AssertionError("no square weight")


def move_an_epsilon(model, layer):
    node = layer_nodes(model, layer, "LayerNormalization")[-1]
    (epsilon,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
    assert epsilon.f == pytest.approx(1e-5)
    epsilon.f = 1e-6


def round_to_bf16(model, layer):
    """Round the left factor of every product to bf16, as in a bf16 layer."""
    nodes = list(model.graph.node)
    for node in layer_nodes(model, layer, "MatMul"):
        x = node.input[0]
        short = helper.make_node("Cast", [x], [f"{x}_short"], to=TensorProto.BFLOAT16)
        wide = helper.make_node("Cast", [f"{x}_short"], [f"{x}_wide"], to=TensorProto.FLOAT)
        if f"{x}_short" not in {output for n in nodes for output in n.output}:
            at = nodes.index(node)
            nodes[at:at] = [short, wide]
        node.input[0] = f"{x}_wide"
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("fault", [transpose_a_weight, move_an_epsilon, round_to_bf16])
@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_a_planted_fault_is_found_in_its_layer(name, fault, layer, infexport, zoo_bundle, tmp_path):
    bundle, model = copied(zoo_bundle(name), tmp_path)
    fault(model, layer)
    onnx.save(model, bundle / "model.onnx")
    report = judged(infexport, bundle, "--no-verify", exit_code=1)
    assert report["verified"] is False
    assert f"the first part out of its budget is layers.{layer}, at 32x32" in report["culprit"]
    for case in report["cases"]:
        assert [part["name"] for part in case["layers"] if not part["passed"]] == [f"layers.{layer}"]


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_a_checkpoint_perturbed_by_a_hundredth_fails_in_its_layer(name, infexport, zoo_bundle, tmp_path):
    shutil.copytree(ZOO / name, tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    random = np.random.default_rng(0)
    for key in [key for key in weights if key.startswith("encoder.layers.1.ff.")]:
        weights[key] = (weights[key] * (1 + 0.01 * random.standard_normal(weights[key].shape))).astype(np.float32)
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    report = judged(infexport, zoo_bundle(name), "--checkpoint", tmp_path / "checkpoint", exit_code=1)
    assert "first part out of its budget is layers.1" in report["culprit"]


def test_people_read_a_table_that_ends_in_the_culprit(infexport, zoo_bundle, tmp_path):
    bundle, model = copied(zoo_bundle("digits-linear"), tmp_path)
    move_an_epsilon(model, 1)
    onnx.save(model, bundle / "model.onnx")
    arguments = ("validate", "parity", bundle, "--layers", "--no-verify", "--sizes", "32")
    lines = infexport(*arguments, exit_code=1).stdout.splitlines()
    assert [line.split()[1] for line in lines if line.endswith("  FAILED")] == ["layers.1"]
    assert lines[-2].startswith("the first part out of its budget is layers.1, at 32x32: its output is off by ")
    assert lines[-1] == "parity FAILED (unverified: the bundle was modified)"


def test_a_graph_without_names_says_what_to_do(infexport, zoo_bundle, tmp_path):
    bundle, _ = copied(zoo_bundle("digits-linear"), tmp_path)
    model = ir.load(bundle / "model.onnx")
    for node in model.graph:
        for output in node.outputs:
            if str(output.name).startswith("layers."):
                output.name = f"another.{output.name}"
    ir.save(model, bundle / "model.onnx")
    arguments = ("validate", "parity", bundle, "--layers", "--no-verify", "--sizes", "32")
    assert "activations have no names" in infexport(*arguments, exit_code=2).stderr
