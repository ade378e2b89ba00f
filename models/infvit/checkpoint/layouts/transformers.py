"""Hugging Face's `ViTForImageClassification` in transformers 5.x (`models/vit/modeling_vit.py`)."""

from infvit.checkpoint.layout import Layout

_THEIRS, _OURS = "vit.layers.{i}", "encoder.layers.{i}"

SHARED = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.*": "patch_embed.*",
    "vit.layernorm.*": "encoder.norm.*",
    "classifier.*": "head.*",
}
"""Names outside the layers, in all versions."""

# The classification model makes no pooler; a model built for the paper's sizes has one.
POOLER = {"vit.pooler.dense.*": "pooler.*"}

IGNORED = ("vit.embeddings.mask_token", "vit.embeddings.position_ids")
"""Ignored keys: one for masked image modelling, and a buffer of old versions."""

LAYOUT = Layout(
    name="transformers",
    norm_eps=1e-12,
    required={
        **SHARED,
        f"{_THEIRS}.layernorm_before.*": f"{_OURS}.norm1.*",
        **{f"{_THEIRS}.attention.{x}_proj.weight": f"{_OURS}.attn.{x}_proj.weight" for x in "qkv"},
        f"{_THEIRS}.attention.o_proj.*": f"{_OURS}.attn.out_proj.*",
        f"{_THEIRS}.layernorm_after.*": f"{_OURS}.norm2.*",
        f"{_THEIRS}.mlp.fc1.*": f"{_OURS}.ff.0.*",
        f"{_THEIRS}.mlp.fc2.*": f"{_OURS}.ff.3.*",
    },
    optional=(
        {f"{_THEIRS}.attention.{x}_proj.bias": f"{_OURS}.attn.{x}_proj.bias" for x in "qkv"},
        POOLER,
    ),
    ignored=IGNORED,
)
