"""Bundles on disk: contents, integrity and provenance."""

from infexport.bundle.bundle import ENGINES, Bundle, create_bundle, open_bundle, seal
from infexport.bundle.integrity import sha256
from infexport.bundle.manifest import Manifest, Stage

__all__ = ["ENGINES", "Bundle", "Manifest", "Stage", "create_bundle", "open_bundle", "seal", "sha256"]
