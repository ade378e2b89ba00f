"""The network's own names, those of the example in the InfSA reference package (`infsa` 0.1.0)."""

from infvit.checkpoint.layout import Layout

_LAYER = "encoder.layers.{i}"
_SAME = (
    "cls_token",
    "pos_embed",
    "patch_embed.*",
    f"{_LAYER}.norm1.*",
    f"{_LAYER}.attn.q_proj.weight",
    f"{_LAYER}.attn.k_proj.weight",
    f"{_LAYER}.attn.v_proj.weight",
    f"{_LAYER}.attn.out_proj.*",
    f"{_LAYER}.norm2.*",
    f"{_LAYER}.ff.0.*",
    f"{_LAYER}.ff.3.*",
    "encoder.norm.*",
    "head.*",
)
_SAME_GROUPS = (
    (f"{_LAYER}.attn.q_proj.bias", f"{_LAYER}.attn.k_proj.bias", f"{_LAYER}.attn.v_proj.bias"),
    (f"{_LAYER}.attn.rho_logit",),
    (f"{_LAYER}.attn.dense.*",),
    ("pooler.*",),
)

LAYOUT = Layout(
    name="reference",
    norm_eps=1e-5,
    required={key: key for key in _SAME},
    optional=tuple({key: key for key in group} for group in _SAME_GROUPS),
)
