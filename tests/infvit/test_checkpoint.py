"""Golden checkpoints of every layout, sources of settings, and checkpoints that cannot be deployed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infvit.checkpoint import LAYOUTS, build_network, load_checkpoint
from infvit.checkpoint.layouts import READERS
from infvit.config import InfViTConfig
from infvit.errors import CheckpointError
from infvit.network import InfViT

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name.removesuffix(".io.safetensors") for path in GOLDEN.glob("*.io.safetensors"))
OPTIONS: dict[str, Any] = {"variant": "linear_infsa", "num_heads": 4}

State = dict[str, Tensor]


def golden(case: str) -> State:
    return load_file(GOLDEN / f"{case}.safetensors")


def save(folder: Path, content: Any, name: str = "checkpoint.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def write_json(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def refused(path: Path, **options: Any) -> CheckpointError:
    """The error of loading `path`, its parts joined in `str` form by `text`."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **{**OPTIONS, **options})
    assert caught.value.summary
    return caught.value


def text(error: CheckpointError) -> str:
    return "\n".join((error.summary, error.details, error.hint))


@pytest.fixture
def reference() -> State:
    return golden("reference_linear")


# Golden cases


def test_all_golden_cases_are_here() -> None:
    assert len(CASES) == 10


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoint_loads(case: str, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path, golden(case)) if suffix == ".pth" else GOLDEN / f"{case}.safetensors"
    sidecar = GOLDEN / f"{case}.json"
    facts = json.loads(sidecar.read_text())
    checkpoint = load_checkpoint(path, config_file=sidecar)

    for field in ("variant", "image_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_dim"):
        assert getattr(checkpoint.config, field) == facts[field]
    assert checkpoint.layout == facts["layout"]
    assert checkpoint.finetuned == ("rho" not in facts)
    assert checkpoint.config.attention_dense == (facts["layout"] == "transformers4_wrapped")
    eps = {"reference": 1e-5, "torchvision": 1e-6, "timm": 1e-6}.get(facts["layout"], 1e-12)
    assert checkpoint.assumed == {"norm_eps": eps}
    assert checkpoint.config.norm_eps == eps
    assert checkpoint.files == (path,)
    with torch.device("meta"):
        expected = InfViT(checkpoint.config).state_dict()
    assert list(checkpoint.state_dict) == list(expected)
    for key, tensor in checkpoint.state_dict.items():
        assert tensor.shape == expected[key].shape
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case: str) -> None:
    network = build_network(load_checkpoint(GOLDEN / f"{case}.safetensors", config_file=GOLDEN / f"{case}.json"))
    io = load_file(GOLDEN / f"{case}.io.safetensors")
    assert not network.training
    with torch.inference_mode():
        error = (network(io["pixels"]) - io["logits_f64"]).norm() / io["logits_f64"].norm()
    assert error < 5e-6


@pytest.mark.parametrize("case", CASES)
def test_layout_is_found_without_a_config(case: str) -> None:
    layout = json.loads((GOLDEN / f"{case}.json").read_text())["layout"]
    assert load_checkpoint(GOLDEN / f"{case}.safetensors", **OPTIONS).layout == layout


# Layouts


def test_names_and_readers_agree() -> None:
    assert tuple(dict.fromkeys(reader.name for reader in READERS)) == LAYOUTS


def test_fused_qkv_is_split_exactly() -> None:
    raw = golden("timm_softmax_linear")
    state = load_checkpoint(GOLDEN / "timm_softmax_linear.safetensors", **OPTIONS).state_dict
    for part, kind in [("q", "weight"), ("k", "weight"), ("v", "weight"), ("q", "bias"), ("v", "bias")]:
        start = 64 * "qkv".index(part)
        rows = raw[f"blocks.1.attn.qkv.{kind}"][start : start + 64]
        assert torch.equal(state[f"encoder.layers.1.attn.{part}_proj.{kind}"], rows)


def torchvision_softmax() -> State:
    """The golden torchvision case as torchvision itself keeps it, in nn.MultiheadAttention."""
    state = golden("torchvision_linear")
    for layer in range(2):
        attention = f"encoder.layers.encoder_layer_{layer}.self_attention"
        del state[f"{attention}.rho_logit"]
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}.{x}_proj.{kind}") for x in "qkv"]
            state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    return state


def transformers4_softmax() -> State:
    """The golden wrapped case as transformers 4 itself keeps it."""
    state = {}
    for key, tensor in golden("transformers4_wrapped_linear").items():
        if "rho_logit" in key or "infsa_attn.out_proj" in key:
            continue
        for theirs, ours in [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]:
            key = key.replace(f"infsa_attn.{theirs}", ours)
        state[key] = tensor
    return state


def test_torchvision_softmax(tmp_path: Path) -> None:
    converted = load_checkpoint(save(tmp_path, torchvision_softmax()), **OPTIONS)
    wrapped = load_checkpoint(GOLDEN / "torchvision_linear.safetensors", **OPTIONS)
    assert (converted.layout, converted.finetuned) == ("torchvision", False)
    for key, tensor in converted.state_dict.items():
        assert "rho" in key or torch.equal(tensor, wrapped.state_dict[key])


def test_transformers4_softmax(tmp_path: Path) -> None:
    state = transformers4_softmax()
    state["vit.embeddings.mask_token"] = torch.zeros(1, 1, 64)
    checkpoint = load_checkpoint(save(tmp_path, state), **OPTIONS)
    assert (checkpoint.layout, checkpoint.finetuned) == ("transformers4", False)
    assert checkpoint.config.attention_dense is False
    projection = checkpoint.state_dict["encoder.layers.0.attn.out_proj.weight"]
    assert torch.equal(projection, state["vit.encoder.layer.0.attention.output.dense.weight"])


@pytest.mark.parametrize(
    ("case", "prefix"),
    [
        ("reference_linear", "pooler"),
        ("torchvision_linear", "heads.pre_logits"),
        ("transformers_linear", "vit.pooler.dense"),
        ("transformers4_wrapped_linear", "vit.pooler.dense"),
        ("timm_softmax_linear", "pre_logits.fc"),
    ],
)
def test_pooler(case: str, prefix: str, tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    path = save(tmp_path, golden(case) | {f"{prefix}.weight": weight, f"{prefix}.bias": torch.zeros(64)})
    checkpoint = load_checkpoint(path, **OPTIONS)
    assert checkpoint.config.pooler
    assert torch.equal(checkpoint.state_dict["pooler.weight"], weight)
    config = write_json(tmp_path / "relu.json", {"pooler_act": "relu"})
    assert "relu" in refused(path, config_file=config).details


def test_no_qkv_bias(reference: State, tmp_path: Path) -> None:
    for key in [key for key in reference if key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]:
        del reference[key]
    assert load_checkpoint(save(tmp_path, reference), **OPTIONS).config.qkv_bias is False


def test_biases_of_some_layers_only(reference: State, tmp_path: Path) -> None:
    del reference["encoder.layers.1.attn.k_proj.bias"]
    error = refused(save(tmp_path, reference))
    assert "reference" in error.summary
    assert error.details == "missing: 1: encoder.layers.1.attn.k_proj.bias\nunexpected: none"
    assert "--layout" in error.hint


def test_missing_and_unexpected_are_listed_together(tmp_path: Path) -> None:
    state = golden("timm_softmax_linear")
    del state["head.weight"]
    state |= {f"blocks.{layer}.ls1.gamma": torch.ones(64) for layer in range(2)}
    state |= {f"extra_{index}": torch.ones(1) for index in range(20)}
    error = refused(save(tmp_path, state))
    assert "'timm'" in error.summary
    assert "missing: 1: head.weight" in error.details
    assert "unexpected: 22: blocks.0.ls1.gamma" in error.details
    assert "and 14 more" in error.details


def test_explicit_layout_that_is_another(tmp_path: Path, reference: State) -> None:
    path = save(tmp_path, reference)
    error = refused(path, layout="timm")
    assert "not in layout 'timm'" in error.summary
    assert "missing" in error.details
    assert "unexpected" in error.details
    assert "--layout reference" in error.hint
    config = write_json(tmp_path / "layout.json", {"layout": "timm"})
    assert "timm" in refused(path, config_file=config).summary
    assert load_checkpoint(path, layout="reference", config_file=config, **OPTIONS).layout == "reference"
    assert "reference, torchvision" in refused(path, layout="keras").hint


@pytest.mark.parametrize(
    "keys",
    [
        ["conv1.weight", "bn1.weight", "bn1.num_batches_tracked", "layer1.0.conv1.weight", "fc.weight"],
        ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"],
    ],
)
def test_another_family(keys: list[str], tmp_path: Path) -> None:
    error = refused(save(tmp_path, {key: torch.zeros(4, 4) for key in keys}))
    assert "not a vision transformer" in error.summary
    assert keys[0] in error.details
    assert "--layout" in error.hint


def test_stray_layer_number_is_cheap(reference: State, tmp_path: Path) -> None:
    reference["encoder.layers.9999.norm1.weight"] = torch.ones(64)
    error = refused(save(tmp_path, reference))
    assert "encoder.layers.9999.norm1.weight" in error.details


# Where settings come from


def test_every_source_in_turn(reference: State, tmp_path: Path) -> None:
    path = save(tmp_path, {"model": reference, "config": {"num_heads": 8, "norm_eps": 1e-4}})
    write_json(tmp_path / "config.json", {"num_heads": 16, "layer_norm_eps": 1e-3, "variant": "pure_infsa"})
    config = write_json(tmp_path / "given.json", {"num_attention_heads": 2})

    option = load_checkpoint(path, num_heads=4, config_file=config)
    assert (option.config.num_heads, option.config.norm_eps, option.config.variant) == (4, 1e-4, "pure_infsa")
    assert option.assumed == {}
    assert load_checkpoint(path, config_file=config).config.num_heads == 2
    assert load_checkpoint(path).config.num_heads == 8
    assert load_checkpoint(path, norm_eps=1e-2).config.norm_eps == 1e-2
    alone = load_checkpoint(save(tmp_path, reference))
    assert (alone.config.num_heads, alone.config.norm_eps) == (16, 1e-3)


def test_a_config_of_something_else_is_not_used(reference: State, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"port": 8080, "size": "large"})
    path = save(tmp_path, reference)
    checkpoint = load_checkpoint(path, **OPTIONS)
    assert checkpoint.config.num_heads == OPTIONS["num_heads"]
    assert checkpoint.preprocessing == {}


def test_config_in_safetensors_metadata(reference: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(reference, path, metadata={"config": json.dumps({**OPTIONS, "labels": list("abcdefghij")})})
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.num_heads == 4
    assert checkpoint.labels == tuple("abcdefghij")
    save_file(reference, path, metadata={"config": "{"})
    assert "metadata" in refused(path).summary


def test_our_own_config_round_trip(reference: State, tmp_path: Path) -> None:
    config = load_checkpoint(save(tmp_path, reference), neumann_terms=3, variant="pure_infsa", num_heads=4).config
    again = load_checkpoint(save(tmp_path, {"state_dict": reference, "config": config.to_dict()}))
    assert again.config == config


def test_embedded_config_may_hold_tensors(reference: State, tmp_path: Path) -> None:
    settings = {**OPTIONS, "mean": (0.5, 0.5, 0.5), "std": torch.ones(3), 3: "x"}
    path = save(tmp_path, {"model": reference, "config": settings})
    assert "cannot use std" in refused(path).summary
    config = write_json(tmp_path / "std.json", {"std": [1, 1, 1]})
    checkpoint = load_checkpoint(path, config_file=config)
    assert checkpoint.preprocessing == {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}


def test_hugging_face_folder(tmp_path: Path) -> None:
    save_file(golden("transformers_pure"), tmp_path / "model.safetensors")
    save(tmp_path, {"not": "weights"}, "training_args.bin")
    names = {str(index): f"class {index}" for index in range(10)}
    settings = {
        "num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "image_size": [32, 32], "patch_size": 8, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
        "qkv_bias": True, "id2label": names,
    }  # fmt: skip
    write_json(tmp_path / "config.json", settings)
    processor = {
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_resize": True, "resample": 3,
        "size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    write_json(tmp_path / "preprocessor_config.json", processor)
    checkpoint = load_checkpoint(tmp_path, variant="pure_infsa")
    assert checkpoint.labels == tuple(names.values())
    assert checkpoint.preprocessing == {
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bicubic",
        "resize_mode": "exact", "resize_size": 32,
    }  # fmt: skip
    assert checkpoint.assumed == {"rho": 0.95}
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]


def test_sharded_folder(tmp_path: Path, reference: State) -> None:
    keys = sorted(reference)
    shards = {"model-1.safetensors": keys[:20], "model-2.safetensors": keys[20:]}
    for name, part in shards.items():
        save_file({key: reference[key] for key in part}, tmp_path / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    index = write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    checkpoint = load_checkpoint(tmp_path, **OPTIONS)
    assert checkpoint.files == (index, *(tmp_path / name for name in shards))
    assert torch.equal(checkpoint.state_dict["head.weight"], reference["head.weight"])

    save(tmp_path, reference, "pytorch_model.bin")
    assert "several weight files" in refused(tmp_path).summary
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(reference, tmp_path / "model-2.safetensors")
    assert "several shards" in refused(tmp_path).summary
    (tmp_path / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in refused(tmp_path).details
    for wrong in ({}, {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 1}}):
        write_json(index, wrong)
        assert "not a shard index" in refused(tmp_path).summary


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(wrapper: str, prefix: str, reference: State, tmp_path: Path) -> None:
    wrapped = {wrapper: {prefix + key: tensor for key, tensor in reference.items()}, "epoch": 3}
    checkpoint = load_checkpoint(save(tmp_path, wrapped, "last.pt"), **OPTIONS)
    assert torch.equal(checkpoint.state_dict["cls_token"], reference["cls_token"])


def test_half_precision(reference: State, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = save(tmp_path, {key: tensor.to(dtype) for key, tensor in reference.items()})
        state = load_checkpoint(path, **OPTIONS).state_dict
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert torch.equal(state["head.weight"], reference["head.weight"].to(dtype).float())


# Variant, heads, discount


def test_variant_and_heads_have_no_default(tmp_path: Path, reference: State) -> None:
    path = save(tmp_path, reference)
    assert "--variant" in refused(path, variant=None).hint
    assert "--num-heads" in refused(path, num_heads=None).hint
    softmax = write_json(tmp_path / "softmax.json", {"variant": "softmax"})
    error = refused(path, variant=None, config_file=softmax)
    assert "--variant" in error.hint
    assert "softmax" in error.details
    for wrong in ("softmax", "infsa"):
        error = refused(path, variant=wrong)
        assert "linear_infsa" in error.details
        assert "pure_infsa" in error.details
    config = write_json(tmp_path / "variant.json", {"variant": "infsa"})
    assert "unknown variant" in refused(path, variant=None, config_file=config).summary


@pytest.mark.parametrize("heads", [0, -4, 5, True, "4", 4.0])
def test_unusable_heads(heads: Any, tmp_path: Path, reference: State) -> None:
    assert "num_heads" in text(refused(save(tmp_path, reference), num_heads=heads))


@pytest.mark.parametrize("eps", [0, -1e-6, math.nan, math.inf, "1e-6"])
def test_unusable_norm_eps(eps: Any, tmp_path: Path, reference: State) -> None:
    assert "norm_eps" in refused(save(tmp_path, reference), norm_eps=eps).summary


def test_neumann_terms(tmp_path: Path, reference: State) -> None:
    path = save(tmp_path, reference)
    assert load_checkpoint(path, variant="pure_infsa", num_heads=4, neumann_terms=7).config.neumann_terms == 7
    assert "Neumann" in refused(path, neumann_terms=7).summary
    assert "neumann_terms" in refused(path, variant="pure_infsa", neumann_terms=0).summary


def discount(state: State) -> list[float]:
    return [round(float(torch.sigmoid(state[key])), 6) for key in state if key.endswith("rho_logit")]


def test_rho_of_a_softmax_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, golden("timm_softmax_linear"))
    checkpoint = load_checkpoint(path, **OPTIONS)
    assert checkpoint.assumed == {"norm_eps": 1e-6, "rho": 0.95}
    assert discount(checkpoint.state_dict) == [0.95, 0.95]
    config = write_json(tmp_path / "rho.json", {"rho": 0.5})
    checkpoint = load_checkpoint(path, config_file=config, **OPTIONS)
    assert (discount(checkpoint.state_dict), checkpoint.assumed) == ([0.5, 0.5], {"norm_eps": 1e-6})
    assert discount(load_checkpoint(path, config_file=config, rho=0.8, **OPTIONS).state_dict) == [0.8, 0.8]
    for wrong in (0.0, 1.0, 1.5, -0.1, math.nan, "0.9"):
        assert "rho" in refused(path, rho=wrong).summary


def test_rho_that_was_learned(tmp_path: Path, reference: State) -> None:
    path = save(tmp_path, reference)
    error = refused(path, rho=0.9)
    assert "own learned" in error.summary
    assert "--rho" in error.hint
    # A training config keeps where rho started; the learned value stands.
    config = write_json(tmp_path / "rho.json", {"rho": 0.5})
    state = load_checkpoint(path, config_file=config, **OPTIONS).state_dict
    key = "encoder.layers.0.attn.rho_logit"
    assert torch.equal(state[key], reference[key])


def test_rho_shapes(tmp_path: Path, reference: State) -> None:
    keys = [f"encoder.layers.{layer}.attn.rho_logit" for layer in range(2)]
    per_head = reference | {key: torch.linspace(1, 2, 4) for key in keys}
    checkpoint = load_checkpoint(save(tmp_path, per_head), **OPTIONS)
    assert checkpoint.config.rho_per_head
    assert torch.equal(checkpoint.state_dict[keys[1]], torch.linspace(1, 2, 4))
    boxed = reference | {key: reference[key].reshape(1) for key in keys}
    checkpoint = load_checkpoint(save(tmp_path, boxed), **OPTIONS)
    assert not checkpoint.config.rho_per_head
    assert checkpoint.state_dict[keys[0]].shape == ()
    mixed = reference | {keys[1]: torch.ones(4)}
    assert keys[1] in refused(save(tmp_path, mixed)).summary


# Contradictions and shapes


@pytest.mark.parametrize(
    ("setting", "value", "actual"),
    [
        ("embed_dim", 768, 64), ("hidden_size", 768, 64), ("num_hidden_layers", 12, 2), ("mlp_dim", 1, 256),
        ("image_size", 224, 32), ("image_size", [32, 64], 32), ("patch_size", 16, 8),
        ("num_classes", 1000, 10), ("qkv_bias", False, True), ("pooler", True, False), ("depth", "2", 2),
    ],
)  # fmt: skip
def test_config_against_shapes(setting: str, value: Any, actual: Any, tmp_path: Path, reference: State) -> None:
    config = write_json(tmp_path / "wrong.json", {setting: value})
    error = refused(save(tmp_path, reference), config_file=config)
    assert f"{setting} in --config {config}: {value!r}" in error.details
    assert f"shapes: {actual}" in error.details


def test_other_activation(tmp_path: Path, reference: State) -> None:
    config = write_json(tmp_path / "relu.json", {"hidden_act": "gelu_new"})
    assert "gelu_new" in refused(save(tmp_path, reference), config_file=config).details


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (["a", "b"], "2 labels, expected 10"), ({"0": "a", "2": "b"}, "0, 1"),
        ("abcdefghij", "list"), ([1] * 10, "list"),
    ],
)  # fmt: skip
def test_unusable_labels(labels: Any, part: str, tmp_path: Path, reference: State) -> None:
    config = write_json(tmp_path / "labels.json", {"labels": labels})
    assert part in refused(save(tmp_path, reference), config_file=config).details


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("encoder.layers.1.attn.k_proj.weight", (64, 32), "[64, 64]"),
        ("encoder.layers.1.ff.3.weight", (64, 128), "[64, 256]"),
        ("cls_token", (1, 64), "[1, 1, 64]"),
        ("pos_embed", (1, 17, 32), "[1, 17, 64]"),
        ("pos_embed", (1, 16, 64), "1 + g·g"),
        ("pos_embed", (1, 1 + 4 * 3, 64), "1 + g·g"),
        ("pos_embed", (1, 1, 64), "1 + g·g"),
        ("pos_embed", (17, 64), "[1, 1 + g·g, E]"),
        ("patch_embed.weight", (64, 192), "[E, 3, P, P]"),
        ("patch_embed.weight", (64, 1, 8, 8), "[64, 3, 8, 8]"),
        ("patch_embed.weight", (64, 3, 8, 4), "[64, 3, 8, 8]"),
        ("head.weight", (0, 64), "[classes, E]"),
        ("head.bias", (9,), "[10]"),
    ],
)
def test_shapes_that_do_not_fit(
    key: str, shape: tuple[int, ...], expected: str, tmp_path: Path, reference: State
) -> None:
    reference[key] = torch.zeros(shape)
    error = refused(save(tmp_path, reference))
    assert key in text(error)
    assert expected in error.details


def test_fused_rows_that_do_not_divide(tmp_path: Path) -> None:
    state = golden("timm_softmax_linear") | {"blocks.0.attn.qkv.weight": torch.zeros(100, 64)}
    assert "blocks.0.attn.qkv.weight" in refused(save(tmp_path, state)).summary


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path, reference: State) -> None:
    reference["encoder.layers.1.ff.0.bias"][7] = value
    error = refused(save(tmp_path, reference))
    assert "'encoder.layers.1.ff.0.bias'" in error.summary
    assert "1 such values of 256" in error.details


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_tensors_that_are_no_floats(dtype: torch.dtype, tmp_path: Path, reference: State) -> None:
    reference["head.weight"] = torch.zeros(10, 64).to(dtype)
    error = refused(save(tmp_path, reference))
    assert "'head.weight'" in error.summary
    assert str(dtype) in error.details


@pytest.mark.parametrize("tensor", [torch.zeros(10, 64).to_sparse(), torch.zeros(10, 64, device="meta")])
def test_tensors_without_plain_storage(tensor: Tensor, tmp_path: Path, reference: State) -> None:
    assert "'head.weight'" in refused(save(tmp_path, reference | {"head.weight": tensor})).summary


# Preprocessing


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"mean": [0, 0, 0], "std": [1, 1, 1], "resize_mode": "shortest", "resize_size": 40},
            {"mean": (0.0,) * 3, "std": (1.0,) * 3, "resize_mode": "shortest", "resize_size": 40},
        ),
        ({"crop_size": 32, "interpolation": "lanczos"}, {"crop_size": 32, "interpolation": "lanczos"}),
        ({"crop_size": 32, "do_center_crop": None, "image_mean": None}, {}),
        (
            {"mean": [0.1, 0.2, 0.3], "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
            {"mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3},
        ),
        (
            {"do_resize": True, "size": {"shortest_edge": 40}, "resample": 2,
             "crop_size": {"height": 32, "width": 32}},
            {"resize_mode": "shortest", "resize_size": 40, "interpolation": "bilinear", "crop_size": 32},
        ),
        (
            {"do_resize": True, "size": 32, "crop_size": {"height": 8, "width": 8}, "do_center_crop": False},
            {"resize_mode": "exact", "resize_size": 32},
        ),
        ({"do_resize": False, "size": 32, "resample": 3}, {}),
        ({"do_normalize": False, "do_rescale": None}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        (
            {"image_mean": [1, 1, 1], "image_std": [1, 1, 1], "rescale_factor": 2 / 255},
            {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        ),
        (
            {"pretrained_cfg": {
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
                "input_size": [3, 32, 32], "crop_pct": 0.9, "crop_mode": "center",
            }},
            {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic",
             "resize_mode": "shortest", "resize_size": 35, "crop_size": 32},
        ),
    ],
)  # fmt: skip
def test_preprocessing(settings: Any, expected: Any, tmp_path: Path, reference: State) -> None:
    config = write_json(tmp_path / "preprocessing.json", settings)
    found = load_checkpoint(save(tmp_path, reference), config_file=config, **OPTIONS).preprocessing
    assert found == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"mean": 0.5}, {"mean": [0.5, 0.5]}, {"std": [1, 1, 0]}, {"std": [1, 1, 10**400]}, {"crop_size": -1},
        {"interpolation": "box"}, {"image_mean": [0, 0, 0], "resample": 4}, {"resize_mode": "fill"},
        {"do_resize": True, "size": {"height": 32, "width": 64}},
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": "1/255"},
    ],
)  # fmt: skip
def test_unusable_preprocessing(settings: Any, tmp_path: Path, reference: State) -> None:
    config = write_json(tmp_path / "preprocessing.json", settings)
    error = refused(save(tmp_path, reference), config_file=config)
    assert "cannot use" in error.summary
    assert "--config" in error.hint


# Files that cannot be read


class RunsCode:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(legacy: bool, tmp_path: Path, reference: State) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "evil.pth"
    content = {"model": reference, "config": RunsCode(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    error = refused(path)
    assert not marker.exists()
    assert "never loaded" in error.summary
    assert "weights_only" not in text(error)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the test's pickle does not do what it is there for"


@pytest.mark.parametrize("name", ["notes.pth", "notes.pt", "notes.bin", "notes.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, these are notes\n", b"\x80\x04\x95", b"PK\x03\x04" + bytes(99)])
def test_files_of_another_kind(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(path)
    assert str(path) in error.summary
    assert "weights_only" not in text(error)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated(share: float, tmp_path: Path, reference: State) -> None:
    whole = {"a.pth": save(tmp_path, reference), "a.safetensors": GOLDEN / "reference_linear.safetensors"}
    for name, source in whole.items():
        content = source.read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        assert name in refused(tmp_path / name).summary


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3), [1, 2], {}, {"model": "vit"}, {"model": {}}, {1: torch.zeros(1)},
        {"weights": {"a": torch.zeros(1)}},
    ],
)  # fmt: skip
def test_no_state_dict_in_the_file(content: Any, tmp_path: Path) -> None:
    assert refused(save(tmp_path, content)).summary


def test_several_state_dicts(tmp_path: Path, reference: State) -> None:
    error = refused(save(tmp_path, {"model": reference, "state_dict": reference}))
    assert "model, state_dict" in error.details


def test_paths(tmp_path: Path, reference: State) -> None:
    assert "no checkpoint" in refused(tmp_path / "missing.pth").summary
    assert "no weights" in refused(tmp_path).summary
    (tmp_path / "weights.h5").write_bytes(b"")
    assert ".h5" in refused(tmp_path / "weights.h5").details
    save(tmp_path, reference, "a.pth")
    save(tmp_path, reference, "b.pt")
    error = refused(tmp_path)
    assert "a.pth, b.pt" in error.details
    assert "a.pth" in error.hint


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe\xfa", b"[" * 100_000, b'{"num_heads": ' + b"9" * 5000]
)
def test_unreadable_config(content: bytes, tmp_path: Path, reference: State) -> None:
    path = save(tmp_path, reference)
    for name in ("config.json", "given.json"):
        (tmp_path / name).write_bytes(content)
        assert "JSON" in refused(path, config_file=tmp_path / name).summary
    assert "config.json" in refused(path).summary
    assert "cannot read" in refused(path, config_file=tmp_path / "missing.json").summary
    assert "cannot read" in refused(path, config_file=tmp_path).summary


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.json"])
def test_permission(name: str, tmp_path: Path, reference: State, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file(reference, path)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    target = tmp_path / name
    error = refused(path, config_file=target) if name == "a.json" else refused(target)
    assert error.details == "Permission denied"


def test_config_type_of_build_network(tmp_path: Path, reference: State) -> None:
    checkpoint = load_checkpoint(save(tmp_path, reference), **OPTIONS)
    assert isinstance(checkpoint.config, InfViTConfig)
    assert torch.equal(build_network(checkpoint).state_dict()["head.bias"], reference["head.bias"])
