"""Runners of graphs by ONNX Runtime, TensorRT or stages, behind one interface."""

from infexport.inference.runners.base import ImageRunner, Placement, StageRunner, spread

__all__ = ["ImageRunner", "Placement", "StageRunner", "spread"]
