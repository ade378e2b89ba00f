"""Words of a config that decide what a network computes, and the only answers an InfViT has to them.

Shapes do not tell these. A config that says something else is of another network, which is an error. What does not
change the function is listed, too (`HARMLESS`), so that any other word can be reported as unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infvit.checkpoint.settings import NAMES, Setting, Source
from infvit.errors import CheckpointError


@dataclass(frozen=True)
class Fixed:
    """A word with one supported meaning.

    Attributes:
        accepted: values that mean what an InfViT computes; null always does.
        expected: that, in words.
        aliases: other names of it.
    """

    accepted: tuple[Any, ...]
    expected: str
    aliases: tuple[str, ...] = ()


def _class(module: str, name: str) -> tuple[str, ...]:
    """Return the spellings of a class in configs: its name, or its Python repr."""
    return name, name.lower(), f"<class '{module}.{name}'>"


_GELU = ("gelu", "gelu_python", *_class("torch.nn.modules.activation", "GELU"))
_NORM = _class("torch.nn.modules.normalization", "LayerNorm")
FIXED: dict[str, Fixed] = {
    # timm, torchvision and common names
    "hidden_act": Fixed(_GELU, "gelu, the exact one", ("act_layer", "activation", "act")),
    "global_pool": Fixed(("token", "cls", False), "token, the class token", ("pool", "pool_type", "pooling")),
    "norm_layer": Fixed(_NORM, "LayerNorm; its epsilon is norm_eps"),
    "embed_layer": Fixed(_class("timm.layers.patch_embed", "PatchEmbed"), "PatchEmbed"),
    "embed_norm_layer": Fixed((), "no norm in the patch embedding"),
    "block_fn": Fixed(_class("timm.models.vision_transformer", "Block"), "Block"),
    "mlp_layer": Fixed(_class("timm.layers.mlp", "Mlp"), "Mlp"),
    "attn_layer": Fixed(_class("timm.layers.attention", "Attention"), "Attention"),
    "in_chans": Fixed((3,), "3 channels, RGB", ("num_channels", "in_channels")),
    "class_token": Fixed((True,), "true"),
    "pos_embed": Fixed(("learn",), "learn"),
    "no_embed_class": Fixed((False,), "false: the class token has a position"),
    "reg_tokens": Fixed((0,), "0", ("num_register_tokens",)),
    "pool_include_prefix": Fixed((False,), "false"),
    "pre_norm": Fixed((False,), "false"),
    "final_norm": Fixed((True,), "true"),
    "fc_norm": Fixed((False,), "false: the norm is before the pooling"),
    "qk_norm": Fixed((False,), "false"),
    "scale_attn_norm": Fixed((False,), "false"),
    "scale_mlp_norm": Fixed((False,), "false"),
    "proj_bias": Fixed((True,), "true"),
    "init_values": Fixed((), "no layer scale", ("layerscale_value",)),
    "dynamic_img_pad": Fixed((False,), "false"),
    "conv_stem_configs": Fixed((), "a patch embedding of one convolution"),
    # Hugging Face
    "pruned_heads": Fixed(({},), "no pruned heads"),
    "is_decoder": Fixed((False,), "false"),
    "is_encoder_decoder": Fixed((False,), "false"),
    "add_cross_attention": Fixed((False,), "false"),
    "do_flip_channel_order": Fixed((False,), "false: RGB"),
    "do_pad": Fixed((False,), "false"),
}
ARCHITECTURES = ("quickgelu", "rope", "gap", "siglip", "relpos", "parallel", "ijepa")
"""Parts of the names of timm's vision transformers whose tensors may be an InfViT's, and whose function is not."""
MOST_LISTED = 20
"""Maximum number of words listed one by one."""
HARMLESS = frozenset({
    # initial values, training, and how the code runs
    "initializer_range", "initializer_factor", "weight_init", "fix_init", "init_std", "dropout", "attention_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "drop_rate", "pos_drop_rate",
    "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "drop_path", "stochastic_depth_prob",
    "lr", "learning_rate", "min_lr", "weight_decay", "epochs", "epoch", "steps", "batch_size", "optimizer",
    "scheduler", "warmup", "warmup_epochs", "warmup_steps", "momentum", "betas", "seed", "device", "num_workers",
    "mixup", "cutmix", "mixup_alpha", "cutmix_alpha", "label_smoothing", "smoothing", "grad_clip", "clip_grad", "amp",
    "ema", "gradient_checkpointing", "dynamic_img_size", "strict_img_size", "torch_dtype", "dtype", "use_bfloat16",
    "torchscript", "return_dict", "output_attentions", "output_hidden_states", "use_return_dict",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward",
    "use_cache", "tie_word_embeddings", "encoder_stride", "problem_type", "finetuning_task",
    # names and origins; the tensors tell the family
    "model_type", "architectures", "architecture", "model_args", "pretrained_cfg", "transformers_version",
    "_name_or_path", "name", "model_name", "description", "dataset", "license", "tags", "version", "author",
    "label2id", "label_descriptions", "image_processor_type", "feature_extractor_type",
    "processor_class", "_processor_class", "_valid_processor_keys",
    # what `infvit.checkpoint.preprocessing` reads
    "mean", "std", "resize_mode", "resize_size", "crop_size", "interpolation", "image_mean", "image_std",
    "do_normalize", "do_rescale", "rescale_factor", "do_resize", "size", "resample", "do_center_crop",
    "do_convert_rgb", "default_to_square", "data_format", "input_data_format", "return_tensors", "disable_grouping",
})  # fmt: skip
"""Words that change nothing of what a trained network computes, or are read elsewhere."""


def check_supported(settings: Mapping[str, Setting], pooler: bool, config: Mapping[str, int]) -> None:
    """Refuse a config of another network.

    Args:
        settings: merged, with the words of FIXED.
        pooler: the network has a pooler.
        config: `embed_dim` and `mlp_dim`, by the shapes.

    Raises:
        CheckpointError: names the word, its value, and what is supported.
    """
    width = config["embed_dim"]
    fixed = dict(FIXED)
    if pooler:
        fixed["pooler_act"] = Fixed(("tanh", *_class("torch.nn.modules.activation", "Tanh")), "tanh")
        fixed["pooler_output_size"] = Fixed((width,), f"{width}, the width of a token")
        fixed["representation_size"] = Fixed((width, True), f"{width}, the width of a token")
    else:
        fixed["representation_size"] = Fixed((False, 0), "none: the tensors have no layer before the head")
    for name, only in fixed.items():
        if name in settings and settings[name].value not in only.accepted:
            raise _unsupported(settings[name], only.expected)
    if "mlp_ratio" in settings:
        ratio = settings["mlp_ratio"]
        number = type(ratio.value) in (int, float) and abs(ratio.value) < 1e6
        if not number or int(width * ratio.value) != config["mlp_dim"]:
            raise _unsupported(ratio, f"{config['mlp_dim'] / width:g}, by the tensors' shapes")
    architecture = settings.get("architecture")
    if architecture is not None and isinstance(architecture.value, str):
        parts = architecture.value.split(".")[0].split("_")
        if other := [part for part in ARCHITECTURES if part in parts]:
            raise _unsupported(architecture, f"a plain vision transformer, not one with {other[0]}")


def unread_words(sources: list[Source]) -> tuple[str, ...]:
    """Return the words of configs that nothing here reads, each with its source, in order; at most MOST_LISTED.

    A word that is null says nothing.
    """
    known = set(WORDS) | {alias for aliases in WORDS.values() for alias in aliases} | HARMLESS
    stated = [(source, key) for source in sources for key, value in source.values.items() if value is not None]
    unread = [f"{key[:80]} in {source.short}" for source, key in stated if key not in known]
    more = [f"{len(unread) - MOST_LISTED} more words"] if len(unread) > MOST_LISTED else []
    return (*unread[:MOST_LISTED], *more)


def _unsupported(setting: Setting, expected: str) -> CheckpointError:
    return CheckpointError(
        "the config is of a network that InfViT is not",
        f"received {setting}\nexpected: {expected}",
        "Convert a checkpoint of a supported network. If the config is wrong, correct it with --config FILE.",
    )


_COMPARED = {"pooler_act": (), "pooler_output_size": (), "representation_size": (), "mlp_ratio": (), "architecture": ()}
WORDS: dict[str, tuple[str, ...]] = {**NAMES, **_COMPARED, **{name: fixed.aliases for name, fixed in FIXED.items()}}
"""Every word that is read → its other names."""
SYNONYMS = {name: fixed.accepted for name, fixed in FIXED.items()}
"""Name of a word → spellings of the one answer to it."""
