"""Hugging Face's `ViTForImageClassification` in transformers 4.x, with its own softmax attention."""

from infvit.checkpoint.layout import Layout
from infvit.checkpoint.layouts.transformers import IGNORED, POOLER, SHARED

_THEIRS, _OURS = "vit.encoder.layer.{i}", "encoder.layers.{i}"
_SELF = f"{_THEIRS}.attention.attention"
_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}

SHARED4 = {
    **SHARED,
    f"{_THEIRS}.layernorm_before.*": f"{_OURS}.norm1.*",
    f"{_THEIRS}.layernorm_after.*": f"{_OURS}.norm2.*",
    f"{_THEIRS}.intermediate.dense.*": f"{_OURS}.ff.0.*",
    f"{_THEIRS}.output.dense.*": f"{_OURS}.ff.3.*",
}
"""All but the attention, in 4.x."""

LAYOUT = Layout(
    name="transformers4",
    norm_eps=1e-12,
    required={
        **SHARED4,
        **{f"{_SELF}.{x}.weight": f"{_OURS}.attn.{y}.weight" for x, y in _NAMES.items()},
        f"{_THEIRS}.attention.output.dense.*": f"{_OURS}.attn.out_proj.*",
    },
    optional=(
        {f"{_SELF}.{x}.bias": f"{_OURS}.attn.{y}.bias" for x, y in _NAMES.items()},
        POOLER,
    ),
    ignored=IGNORED,
)
