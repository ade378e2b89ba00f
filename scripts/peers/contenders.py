"""Who is measured."""

from __future__ import annotations

from dataclasses import dataclass

OURS = ("linear-fp32", "linear-int8")
"""What all others are compared with."""


@dataclass(frozen=True)
class Contender:
    """A way to run a network, or a matrix product.

    Attributes:
        name: unique.
        family: whose logits it must have; `gemm` has none.
        how: `bundle`, `eager`, `compile`, `ort`, or a kind of `infexport.gemm`.
        precision: of the dense products.
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
        folded = "" if self.folded else ", not folded"
        return f"{self.family}: {ways.get(self.how, f'infexport {self.precision}{folded}')}"


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
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def chosen(only: str | None) -> list[Contender]:
    """The products, always, and the contenders named: the softmax ViT's two ways together.

    Raises:
        ValueError: a name that is none.
    """
    names = set(BY_NAME) if only is None else set(only.split(","))
    if names - set(BY_NAME):
        raise ValueError(f"no contender: {', '.join(sorted(names - set(BY_NAME)))}; there are {', '.join(BY_NAME)}")
    if names & {"softmax-eager", "softmax-ort"}:
        names |= {"softmax-eager", "softmax-ort"}  # the one is misleading without the other
    return [contender for contender in CONTENDERS if contender.family == "gemm" or contender.name in names]
