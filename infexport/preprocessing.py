"""The manifest's preprocessing as the transform images are fitted with."""

from __future__ import annotations

from infexport.images import EvalTransform
from infexport.manifest import Manifest


def transform_of(manifest: Manifest) -> EvalTransform:
    """The evaluation transform a bundle records."""
    fields = ("resize_mode", "resize_size", "crop_size", "interpolation")
    return EvalTransform.from_dict({name: manifest.preprocessing[name] for name in fields})
