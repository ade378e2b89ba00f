"""Transformers 4.x with the attention wrapped by the InfSA reference package (`infsa` 0.1.0).

The wrapper brings an output projection of its own and leaves the model's in place, so two E→E layers follow
each attention: `infsa_attn.out_proj`, then `attention.output.dense`.
"""

from infvit.checkpoint.layout import Layout
from infvit.checkpoint.layouts.transformers import IGNORED, POOLER
from infvit.checkpoint.layouts.transformers4 import SHARED4

_THEIRS, _OURS = "vit.encoder.layer.{i}.attention", "encoder.layers.{i}.attn"
_WRAPPER = f"{_THEIRS}.attention.infsa_attn"

LAYOUT = Layout(
    name="transformers4_wrapped",
    norm_eps=1e-12,
    required={
        **SHARED4,
        **{f"{_WRAPPER}.{x}_proj.weight": f"{_OURS}.{x}_proj.weight" for x in "qkv"},
        f"{_WRAPPER}.out_proj.*": f"{_OURS}.out_proj.*",
        f"{_THEIRS}.output.dense.*": f"{_OURS}.dense.*",
    },
    optional=(
        {f"{_WRAPPER}.{x}_proj.bias": f"{_OURS}.{x}_proj.bias" for x in "qkv"},
        {f"{_WRAPPER}.rho_logit": f"{_OURS}.rho_logit"},
        POOLER,
    ),
    ignored=IGNORED,
)
