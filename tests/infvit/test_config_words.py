"""Every word of a checkpoint's config is read: those that decide the function are accepted, refused or reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import GOLDEN

from infvit.checkpoint import Checkpoint, load_checkpoint
from infvit.checkpoint.supported import FIXED, HARMLESS, WORDS
from infvit.errors import CheckpointError

OPTIONS = {"variant": "linear_infsa", "num_heads": 4}
PATHS = {
    "timm": "timm_softmax_linear", "transformers": "transformers_linear", "torchvision": "torchvision_linear",
    "reference": "reference_linear",
}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Load a golden checkpoint of a family with a config beside it, or in it."""

    def get(family: str, config: dict[str, Any], embedded: bool = False, **options: Any) -> Checkpoint:
        metadata = {"config": json.dumps(config)} if embedded else None
        save_file(load_file(GOLDEN / f"{PATHS[family]}.safetensors"), tmp_path / "model.safetensors", metadata)
        if not embedded:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return load_checkpoint(tmp_path / "model.safetensors", **{**OPTIONS, **options})

    return get


@pytest.mark.parametrize(
    ("family", "word", "value"),
    [
        ("timm", "global_pool", "avg"), ("timm", "global_pool", "map"), ("timm", "act_layer", "quick_gelu"),
        ("timm", "act_layer", "relu"), ("timm", "norm_layer", "RmsNorm"), ("timm", "pre_norm", True),
        ("timm", "fc_norm", True), ("timm", "qk_norm", True), ("timm", "init_values", 1e-5),
        ("timm", "reg_tokens", 4), ("timm", "class_token", False), ("timm", "no_embed_class", True),
        ("timm", "mlp_ratio", 3.0), ("timm", "num_features", 512), ("timm", "in_chans", 1),
        ("timm", "architecture", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("transformers", "hidden_act", "gelu_new"), ("transformers", "hidden_act", "gelu_pytorch_tanh"),
        ("transformers", "qkv_bias", False), ("transformers", "num_channels", 4),
        ("transformers", "pruned_heads", {"0": [1]}), ("transformers", "is_decoder", True),
        ("transformers", "intermediate_size", 512), ("transformers", "do_flip_channel_order", True),
        ("torchvision", "representation_size", 64), ("torchvision", "num_layers", 12),
        ("torchvision", "conv_stem_configs", [{"out_channels": 64}]),
        ("reference", "activation", "relu"), ("reference", "pooling", "mean"), ("reference", "pooler", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["beside", "embedded", "model_args"])
def test_a_word_that_contradicts_the_network_is_refused_by_name(load, place, family, word, value):
    config = {"model_args": {word: value}} if place == "model_args" else {word: value}
    with pytest.raises(CheckpointError) as caught:
        load(family, config, embedded=place == "embedded")
    said = f"{caught.value.details}\n{caught.value.hint}"
    assert word in said
    assert str(value)[:8] in said
    assert "expected" in said or "shapes" in said
    assert "--config" in caught.value.hint


@pytest.mark.parametrize("family", PATHS)
def test_what_the_network_does_compute_is_taken(load, family):
    """Test every spelling of a word."""
    words = {name: fixed.accepted[0] for name, fixed in FIXED.items() if fixed.accepted}
    plain = {"embed_dim": 64, "drop_path_rate": 0.1, "architecture": "vit_base_patch16_224.augreg_in21k"}
    checkpoint = load(family, words | plain | {"init_values": None, "model_args": {"act_layer": "gelu"}})
    assert checkpoint.unread == ()
    assert checkpoint.overridden == ()


def test_pooler_words_are_those_of_a_network_that_has_one(load):
    load("transformers", {"pooler_act": "relu", "pooler_output_size": 3})


def test_arguments_of_timm_s_network_are_its_settings(load):
    checkpoint = load("timm", {"model_args": {"num_heads": 2}, "num_heads": 8}, num_heads=None)
    assert checkpoint.config.num_heads == 2
    (sentence,) = checkpoint.overridden
    assert sentence == "num_heads in model_args of config.json: 2 is used, not num_heads in config.json: 8"


@pytest.mark.parametrize("name", [name for name, fixed in FIXED.items() if fixed.accepted])
def test_two_spellings_of_one_answer_contradict_nothing(load, tmp_path, name):
    for spelling in FIXED[name].accepted:
        (tmp_path / "given.json").write_text(json.dumps({name: spelling}))
        checkpoint = load("timm", {name: FIXED[name].accepted[0]}, config_file=tmp_path / "given.json")
        assert checkpoint.overridden == ()


@pytest.mark.parametrize(("word", "value"), [("hidden_act", "gelu_python"), ("global_pool", False)])
def test_other_codes_words_of_the_same_network_are_taken(load, word, value):
    """Transformers' exact GELU in Python, and the class token in the code of masked autoencoders."""
    checkpoint = load("timm", {word: value})
    assert (checkpoint.overridden, checkpoint.unread) == ((), ())


def test_a_null_says_nothing_and_a_loss_changes_no_answer(load):
    null = dict.fromkeys(["pad_size", "image_seq_length", "num_heads", "mean"])
    assert load("transformers", null | {"problem_type": "single_label_classification"}).unread == ()


@pytest.mark.parametrize(("word", "other"), [("mean", "image_mean"), ("num_classes", "num_labels")])
def test_values_nested_too_deeply_to_compare_are_refused(word, other):
    """Values that pickles may contain."""

    def nested() -> list[Any]:
        value: list[Any] = []
        for _ in range(10_000):
            value = [value]
        return value

    config = {word: nested(), other: nested(), "image_std": nested()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(GOLDEN / "reference_linear.safetensors", config=config, **OPTIONS)
    assert word in f"{caught.value} {caught.value.details}"


def test_words_that_nothing_reads_are_told(load):
    checkpoint = load("reference", {"lr": 0.1, "hidden_dropout_prob": 0.1, "attention_window": 7})
    assert checkpoint.unread == ("attention_window in config.json",)
    many = load("reference", {f"word{index}" * 50: 1 for index in range(99)}).unread
    assert len(many) == 21
    assert max(map(len, many)) < 100
    assert many[-1] == "79 more words"


def test_no_word_is_both_read_and_harmless():
    names = [*WORDS, *(alias for aliases in WORDS.values() for alias in aliases)]
    assert len(names) == len(set(names))
    # what may be anything, or is read elsewhere
    assert set(names) & HARMLESS <= {"architecture"}


CONFIG = {"num_heads": 2, "norm_eps": 1e-3, "variant": "pure_infsa", "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
OTHERS = {"num_heads": 8, "norm_eps": 1e-4, "variant": "linear_infsa", "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize("by", ["option", "file"])
def test_what_is_used_instead_of_a_config_s_word_is_recorded(load, tmp_path, name, by):
    options: dict[str, Any] = {"variant": None, "num_heads": None}
    if by == "option":
        options[name] = OTHERS[name]
    else:
        (tmp_path / "given.json").write_text(json.dumps({name: OTHERS[name]}))
        options["config_file"] = tmp_path / "given.json"
    checkpoint = load("reference", CONFIG, **options)
    (sentence,) = checkpoint.overridden
    assert f"{name} in {'the options' if by == 'option' else '--config given.json'}: " in sentence
    assert f"is used, not {name} in config.json: " in sentence
    assert load("reference", CONFIG, **{**options, name: CONFIG[name], "config_file": None}).overridden == ()


def test_the_given_config_is_told_from_one_of_its_name_beside_the_weights(load, tmp_path):
    (tmp_path / "given").mkdir()
    given = tmp_path / "given" / "config.json"
    given.write_text(json.dumps({"num_heads": 2, "wheels": 4}))
    checkpoint = load("reference", {"num_heads": 8, "wheels": 4}, num_heads=None, config_file=given)
    expected = "num_heads in --config config.json: 2 is used, not num_heads in config.json: 8"
    assert checkpoint.overridden == (expected,)
    assert checkpoint.unread == ("wheels in --config config.json", "wheels in config.json")


def test_a_softmax_checkpoint_is_given_an_attention_and_labels_their_names(load):
    placeholders = {str(index): f"LABEL_{index}" for index in range(10)}
    config = {"variant": "softmax", "id2label": placeholders}
    assert load("timm", config, labels=[f"class {index}" for index in range(10)]).overridden == ()
    named = {"labels": [f"other {index}" for index in range(10)]}
    assert len(load("timm", named, labels=[f"class {index}" for index in range(10)]).overridden) == 1


@pytest.mark.slow
def test_the_command_line_says_and_records_both(infexport, tmp_path):
    save_file(load_file(GOLDEN / "reference_linear.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "mean": [0.1] * 3, "wheels": 4}))
    arguments = ("--variant", "linear_infsa", "--num-heads", 4, "--mean", "0.5,0.5,0.5", "--no-fold")
    result = infexport("convert", "checkpoint", tmp_path / "model.safetensors", *arguments, "-o", tmp_path / "b")
    heads = "num_heads in the options: 4 is used, not num_heads in config.json: 2"
    assert f"says otherwise: {heads}" in result.stderr
    assert "mean in config.json: [0.1, 0.1, 0.1]" in result.stderr
    assert "not read: wheels in config.json" in result.stderr
    manifest = json.loads((tmp_path / "b" / "infexport.json").read_text())
    assert heads in manifest["overridden"]
    assert manifest["unread"] == ["wheels in config.json"]
    again = infexport("inspect", tmp_path / "b")
    assert heads in again.stderr
    assert "wheels in config.json" in again.stdout


# Labels

NAMES = [f"class {index}" for index in range(10)]


@pytest.mark.parametrize(
    "form",
    [
        NAMES,
        {str(index): name for index, name in enumerate(NAMES)},
        {name: index for index, name in enumerate(NAMES)},
        {str(index): [f"n{index:08}", name] for index, name in enumerate(NAMES)},
        [[f"n{index:08}", name] for index, name in enumerate(NAMES)],
        {str(index): NAMES[index] for index in reversed(range(10))},
    ],
    ids=["list", "index to name", "name to index", "imagenet_class_index.json", "list of pairs", "any order"],
)
def test_every_form_of_labels(load, infexport, tmp_path, form):
    assert load("reference", {"labels": form}).labels == tuple(NAMES)
    assert load("reference", {}, labels=form).labels == tuple(NAMES)


@pytest.mark.parametrize(
    "form",
    [
        {str(index): ["tench", "fish"] for index in range(10)}, {str(index): index / 2 for index in range(10)},
        dict.fromkeys(NAMES, 0), {name: index + 1 for index, name in enumerate(NAMES)}, [NAMES], [*NAMES[1:], None],
        {str(index + 1): name for index, name in enumerate(NAMES)}, {"labels": NAMES}, "class", list(range(10)),
    ],
    ids=lambda form: str(form)[:40],
)  # fmt: skip
def test_other_forms_of_labels_are_refused(infexport, tmp_path, form):
    """Not written as Python prints them."""
    Path(tmp_path / "labels.json").write_text(json.dumps(form))
    arguments = ("--variant", "linear_infsa", "--num-heads", 4, "--labels", tmp_path / "labels.json")
    checkpoint = GOLDEN / "reference_linear.safetensors"
    said = infexport("convert", "checkpoint", checkpoint, *arguments, "-o", tmp_path / "b", exit_code=2).stderr
    assert "labels" in said
    assert "expected" in said
