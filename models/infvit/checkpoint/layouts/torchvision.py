"""`torchvision.models.vision_transformer.VisionTransformer`, plain and with attention wrapped by InfSA."""

from infvit.checkpoint.layout import Layout

_THEIRS, _OURS = "encoder.layers.encoder_layer_{i}", "encoder.layers.{i}"
_SHARED = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.*": "patch_embed.*",
    f"{_THEIRS}.ln_1.*": f"{_OURS}.norm1.*",
    f"{_THEIRS}.self_attention.out_proj.*": f"{_OURS}.attn.out_proj.*",
    f"{_THEIRS}.ln_2.*": f"{_OURS}.norm2.*",
    f"{_THEIRS}.mlp.0.*": f"{_OURS}.ff.0.*",
    f"{_THEIRS}.mlp.3.*": f"{_OURS}.ff.3.*",
    "encoder.ln.*": "encoder.norm.*",
    "heads.head.*": "head.*",
}
# `representation_size` puts Linear and Tanh before the head.
_POOLER = {"heads.pre_logits.*": "pooler.*"}

WRAPPED = Layout(
    name="torchvision",
    norm_eps=1e-6,
    required={
        **_SHARED,
        **{f"{_THEIRS}.self_attention.{x}_proj.weight": f"{_OURS}.attn.{x}_proj.weight" for x in "qkv"},
    },
    optional=(
        {f"{_THEIRS}.self_attention.{x}_proj.bias": f"{_OURS}.attn.{x}_proj.bias" for x in "qkv"},
        {f"{_THEIRS}.self_attention.rho_logit": f"{_OURS}.attn.rho_logit"},
        _POOLER,
    ),
)

# nn.MultiheadAttention keeps the three projections in one tensor.
SOFTMAX = Layout(
    name="torchvision",
    norm_eps=1e-6,
    required={**_SHARED, f"{_THEIRS}.self_attention.in_proj_weight": f"{_OURS}.attn.qkv.weight"},
    optional=({f"{_THEIRS}.self_attention.in_proj_bias": f"{_OURS}.attn.qkv.bias"}, _POOLER),
)
