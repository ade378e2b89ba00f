"""The exported module: pixels in, logits and features out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from infexport.errors import InfexportError
from infvit.fold import can_fold_normalisation, fold_normalisation
from infvit.network import InfViT
from infvit.rewrite import is_untouched


class Normalise(nn.Module):
    """Normalisation of pixels, as the bundle takes them, to the input of the patch embedding.

    Args:
        mean, std: of the pixels in [0, 1], per RGB channel.
        takes: `uint8`, RGB `[B, H, W, 3]`, or `float32`, normalised `[B, 3, H, W]`, which stay as they are.
        folded: the patch embedding normalises uint8 pixels by its weights (`infvit.fold`).
        dtype: of what it gives.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], takes: str, folded: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.takes, self.folded = takes, folded
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.takes == "float32":
            return image
        # cast before anything else: TensorRT takes uint8 as an input and knows only Cast for it
        image = image.to(self.mean.dtype)
        return image if self.folded else (image.permute(0, 3, 1, 2) / 255 - self.mean) / self.std


class ImageModel(nn.Module):
    """An InfViT with its normalisation in front.

    Args:
        network: the InfViT; its dtype is the dtype of everything.
        mean, std: of the pixels in [0, 1], per RGB channel.
        takes: `uint8`, RGB `image [B, H, W, 3]`, or `float32`, normalised `pixels [B, 3, H, W]`.
        fold: normalise uint8 pixels by the patch embedding's weights (`infvit.fold`), where that can be.

    Raises:
        InfexportError: a network with hooks or a `forward` of its own, which would not be called.
    """

    def __init__(
        self,
        network: InfViT,
        mean: Sequence[float],
        std: Sequence[float],
        takes: str = "uint8",
        fold: bool = False,
    ) -> None:
        super().__init__()
        if type(network).forward is not InfViT.forward or not is_untouched(network):
            raise InfexportError(
                "the network has a forward of its own",
                f"received a {type(network).__name__} with hooks or other methods, expected the forward of InfViT",
                "remove the hooks; change forward_features or embed in a subclass, or a layer, instead",
            )
        self.takes = takes
        folded = fold and takes == "uint8" and can_fold_normalisation(network)
        self.normalise = Normalise(mean, std, takes, folded, network.head.weight.dtype)
        self.network = fold_normalisation(network, mean, std) if folded else network
        self._taken: list[Tensor] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Have `forward` also return the tokens that every layer takes, `[B, N, E]` each, within the block."""

        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._taken.append(inputs[0])

        hooks = [layer.register_forward_pre_hook(take) for layer in self.network.encoder.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._taken.clear()

    @property
    def input_name(self) -> str:
        return "image" if self.takes == "uint8" else "pixels"

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return logits `[B, num_classes]` and features `[B, E]`."""
        self._taken.clear()
        features = self.network.forward_features(self.normalise(image))
        return self.network.head(features), features, *self._taken
