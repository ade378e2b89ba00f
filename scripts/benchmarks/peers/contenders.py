"""Who is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS = ("linear-fp32", "linear-int8")
"""What all others are compared with."""
OURS_ON_GPU = ("linear-fp32", "linear-fp16")
ENGINES = ("fp32", "fp16", "bf16")
"""Precisions of engines."""


@dataclass(frozen=True)
class Contender:
    """A way to run a network, or a matrix product.

    Attributes:
        name: unique.
        family: whose logits it must have; `gemm` has none.
        how: `bundle`, `engine`, `eager`, `compile`, `ort`; a kind of `evaluation.benchmark.gemm`, or `torch`,
            which is that product in torch.
        precision: of the dense products; torch's and exports' of everything.
        folded: by infexport's exact rewrites.
    """

    name: str
    family: str
    how: str
    precision: str = "fp32"
    folded: bool = False

    @property
    def label(self) -> str:
        """For people."""
        ways = {"eager": "torch, eager", "compile": "torch.compile", "ort": "torch.onnx.export in ONNX Runtime"}
        if self.how in ways:
            precision = "" if self.precision == "fp32" else f", {self.precision}"
            return f"{self.family}: {ways[self.how]}{precision}{', folded' if self.folded else ''}"
        folded = "" if self.folded else ", not folded"
        return f"{self.family}: infexport {'engine ' * (self.how == 'engine')}{self.precision}{folded}"

    @property
    def product(self) -> str:
        """The kind of `infexport.evaluation.benchmark.gemm` that a product is."""
        return {"fp32": "float32", "fp16": "float16"}[self.precision] if self.how == "torch" else self.how


CONTENDERS = (
    Contender("gemm-ort-float32", "gemm", "float32"),
    Contender("gemm-ort-int8", "gemm", "int8", "int8"),
    Contender("gemm-torch-float32", "gemm", "torch"),
    Contender("linear-eager", "linear", "eager"),
    Contender("linear-compile", "linear", "compile"),
    Contender("linear-ort", "linear", "ort"),
    Contender("linear-fp32-no-fold", "linear", "bundle"),
    Contender("linear-fp32", "linear", "bundle", folded=True),
    Contender("linear-int8", "linear", "bundle", "int8", folded=True),
    Contender("pure-eager", "pure", "eager"),
    Contender("pure-compile", "pure", "compile"),
    Contender("pure-ort", "pure", "ort"),
    Contender("pure-fp32", "pure", "bundle", folded=True),
    Contender("pure-int8", "pure", "bundle", "int8", folded=True),
    Contender("softmax-eager", "softmax", "eager"),
    Contender("softmax-ort", "softmax", "ort"),
    Contender("softmax-compile", "softmax", "compile"),
)
ON_GPU = (
    Contender("gemm-ort-float32", "gemm", "float32"),
    Contender("gemm-ort-float16", "gemm", "float16", "fp16"),
    Contender("gemm-torch-float32", "gemm", "torch"),
    Contender("gemm-torch-float16", "gemm", "torch", "fp16"),
    Contender("linear-eager", "linear", "eager"),
    Contender("linear-eager-fp16", "linear", "eager", "fp16"),
    Contender("linear-compile-fp16", "linear", "compile", "fp16"),
    Contender("linear-compile-folded", "linear", "compile", folded=True),
    Contender("linear-ort", "linear", "ort"),
    Contender("linear-ort-fp16", "linear", "ort", "fp16"),
    Contender("linear-fp32", "linear", "bundle", folded=True),
    Contender("linear-fp16", "linear", "bundle", "fp16", folded=True),
    *(Contender(f"linear-engine-{name}", "linear", "engine", name, folded=True) for name in ENGINES),
    Contender("pure-eager", "pure", "eager"),
    Contender("pure-eager-fp16", "pure", "eager", "fp16"),
    Contender("pure-compile-fp16", "pure", "compile", "fp16"),
    Contender("pure-ort", "pure", "ort"),
    Contender("pure-ort-fp16", "pure", "ort", "fp16"),
    Contender("pure-fp32", "pure", "bundle", folded=True),
    Contender("pure-fp16", "pure", "bundle", "fp16", folded=True),
    *(Contender(f"pure-engine-{name}", "pure", "engine", name, folded=True) for name in ENGINES),
    Contender("softmax-eager", "softmax", "eager"),
    Contender("softmax-ort", "softmax", "ort"),
    Contender("softmax-eager-fp16", "softmax", "eager", "fp16"),
    Contender("softmax-ort-fp16", "softmax", "ort", "fp16"),
    Contender("softmax-compile-fp16", "softmax", "compile", "fp16"),
)
BY_NAME = {contender.name: contender for contender in (*ON_GPU, *CONTENDERS)}
"""Of both devices: a name is the same contender on either."""


def chosen(only: str | None, device: str = "cpu", engines: Sequence[str] = ()) -> list[Contender]:
    """The products, always, and the contenders named: the softmax ViT's two ways together.

    Args:
        only: names; None for all.
        device: `cpu` or `cuda`.
        engines: the precisions of those that are measured.

    Raises:
        ValueError: a name that is none.
    """
    there = CONTENDERS if device == "cpu" else ON_GPU
    there = tuple(each for each in there if each.how != "engine" or each.precision in engines)
    known = {contender.name: contender for contender in there}
    names = set(known) if only is None else set(only.split(","))
    if names - set(known):
        raise ValueError(f"no contender: {', '.join(sorted(names - set(known)))}; there are {', '.join(known)}")
    for suffix in ("", "-fp16"):
        ways = {f"softmax-eager{suffix}", f"softmax-ort{suffix}"}
        if names & ways:
            names |= ways  # the one is misleading without the other
    return [contender for contender in there if contender.family == "gemm" or contender.name in names]
