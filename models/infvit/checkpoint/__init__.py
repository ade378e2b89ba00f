"""Checkpoints: file or folder → `Checkpoint`, whatever layout the tensors were saved in."""

from infvit.checkpoint.layouts import LAYOUTS
from infvit.checkpoint.load import Checkpoint, build_network, load_checkpoint

__all__ = ["LAYOUTS", "Checkpoint", "build_network", "load_checkpoint"]
