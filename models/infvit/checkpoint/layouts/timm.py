"""`timm.models.vision_transformer.VisionTransformer` with a class token; its q, k and v are one tensor."""

from infvit.checkpoint.layout import Layout

_THEIRS, _OURS = "blocks.{i}", "encoder.layers.{i}"

LAYOUT = Layout(
    name="timm",
    norm_eps=1e-6,
    required={
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.*": "patch_embed.*",
        f"{_THEIRS}.norm1.*": f"{_OURS}.norm1.*",
        f"{_THEIRS}.attn.qkv.weight": f"{_OURS}.attn.qkv.weight",
        f"{_THEIRS}.attn.proj.*": f"{_OURS}.attn.out_proj.*",
        f"{_THEIRS}.norm2.*": f"{_OURS}.norm2.*",
        f"{_THEIRS}.mlp.fc1.*": f"{_OURS}.ff.0.*",
        f"{_THEIRS}.mlp.fc2.*": f"{_OURS}.ff.3.*",
        "norm.*": "encoder.norm.*",
        "head.*": "head.*",
    },
    optional=(
        {f"{_THEIRS}.attn.qkv.bias": f"{_OURS}.attn.qkv.bias"},
        # `representation_size` of timm up to 0.6: Linear and Tanh before the head.
        {"pre_logits.fc.*": "pooler.*"},
    ),
)
