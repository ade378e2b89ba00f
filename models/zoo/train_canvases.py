#!/usr/bin/env python3
"""Train the zoo's models that have something to find: one small digit somewhere on a larger textured canvas.

    python models/zoo/train_canvases.py linear_infsa pure_infsa

Each model is written to `models/zoo/canvases-<name>`, like those of `train_digits.py`. It is trained at 64×64 only and
measured at 64², 128² and 256². The digit keeps its size; the canvas has 4 and 16 times the area.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from train_digits import NAMES, RECIPE, ZOO, digits, fit, normalise, shifted, write

from infvit.config import InfViTConfig
from infvit.network import InfViT

PATCH, DIGIT, TRAINED, SMOOTH = 8, 24, 64, 16
"""Sizes in pixels: sides of a patch, a digit and a training canvas; distance between the bumps of a texture."""
SIZES = (64, 128, 256)
SAMPLES = {64: 10, 128: 10, 256: 2}
"""Held-out canvases that ship, by size."""
CANVASES = RECIPE | {
    "dataset": "scikit-learn load_digits, 8x8 resized to 24x24 bicubic, in white at multiples of 8 pixels on 64x64 "
    "canvases of smooth noise, other places and noise every epoch",
    "epochs": 120,
}
CARD = """# {name}

A digit of 24×24 pixels somewhere on a textured canvas, attention `{variant}`: 4 layers, embed_dim 128, 4 heads, patch
8, {parameters:,} parameters. Trained on canvases of 64×64; on larger ones the digit is as large as it was.

| canvas | share of it that is the digit | right, of {images} held-out digits |
|---|---|---|
{rows}

Trained in {seconds:.0f} s on 2 CPU cores by `python models/zoo/train_canvases.py {variant}`; `training.json` has the
whole recipe, `config.json` the labels and the preprocessing. Data: scikit-learn's `load_digits` (UCI Optical
Recognition of Handwritten Digits, CC BY 4.0). Some held-out canvases are in
[`canvases-held-out`](../canvases-held-out), with the digits' places in `canvases.csv`.

    infexport convert checkpoint models/zoo/{name} --output bundle
    infexport run-engine bundle models/zoo/canvases-held-out/128 --size native --heatmaps heatmaps
"""


def texture(random: np.random.Generator, count: int, size: int) -> NDArray[np.float64]:
    """Smooth noise `[count, size, size, 3]`, mean 96 and deviation 40: bumps of random height on a grid."""
    centres = np.arange(-2 * SMOOTH, size + 2 * SMOOTH + 1, SMOOTH)
    bumps = np.exp(-0.5 * ((np.arange(size) + 0.5 - centres[:, None]) / (0.75 * SMOOTH)) ** 2)
    bumps /= np.sqrt((bumps**2).sum(0))  # every pixel has the same deviation
    heights = random.normal(size=(count, 3, len(centres), len(centres)))
    noise = (bumps.T @ heights @ bumps).transpose(0, 2, 3, 1)
    return np.clip(96 + 40 * noise, 0, 255)


def canvases(
    random: np.random.Generator, ink: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Put digits `[n, 24, 24, 3]` on canvases, uint8 `[n, size, size, 3]`; also return places, `[n, 2]` in patches."""
    images = texture(random, len(ink), size)
    places = random.integers(0, (size - DIGIT) // PATCH + 1, (len(ink), 2))
    for image, digit, (top, left) in zip(images, ink, places * PATCH, strict=True):
        opacity = digit / 255
        here = image[top : top + DIGIT, left : left + DIGIT]
        here += opacity * (255 - here)
    return images.round().astype(np.uint8), places


def held_out(size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Canvases `[n, size, size, 3]` of the held-out digits, labels and places: the same every time."""
    _, _, ink, labels = digits(DIGIT)
    images, places = canvases(np.random.default_rng(size), ink, size)
    return images, labels, places


def right(network: InfViT, size: int) -> float:
    """Return the share of held-out canvases of a size that a network classifies correctly."""
    images, labels, _ = held_out(size)
    with torch.no_grad():
        parts = [network(normalise(torch.from_numpy(part))) for part in np.array_split(images, 15)]
    return float((torch.cat(parts).argmax(-1).numpy() == labels).mean())


def train(config: InfViTConfig) -> tuple[InfViT, float]:
    """Train a network; return it and the seconds it took."""
    torch.manual_seed(CANVASES["seed"])
    random = np.random.default_rng(CANVASES["seed"])
    generator = torch.Generator().manual_seed(CANVASES["seed"])
    ink, labels, _, _ = digits(DIGIT)
    network = InfViT(config)
    batch = CANVASES["batch_size"]

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        order = random.permutation(len(ink))
        images, _ = canvases(random, ink[order], TRAINED)
        pixels = normalise(torch.from_numpy(images))
        for start in range(0, len(order), batch):
            here = slice(start, start + batch)
            yield shifted(pixels[here], generator), torch.from_numpy(labels[order[here]])

    return network, fit(network, CANVASES, CANVASES["epochs"] * -(-len(ink) // batch), epoch)


def save(network: InfViT, seconds: float, folder: Path) -> dict[str, float]:
    """Write a checkpoint; return the accuracy at every size."""
    accuracy = {f"{size}": round(right(network, size), 4) for size in SIZES}
    count = len(digits(DIGIT)[3])
    share = {size: DIGIT**2 / size**2 for size in SIZES}
    trained = CANVASES | {
        "held_out_accuracy": accuracy, "held_out_images": count, "seconds_on_2_cores": round(seconds)
    }  # fmt: skip
    card = CARD.format(
        name=folder.name,
        variant=network.config.variant,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        images=count,
        rows="\n".join(f"| {size}² | {share[size]:.1%} | **{accuracy[str(size)]:.2%}** |" for size in SIZES),
        seconds=seconds,
    )
    write(network, folder, trained, card)
    return accuracy


def save_samples(folder: Path) -> None:
    """Write held-out canvases of each size, one of a digit, in a folder per class, and a table of the places."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "canvases.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "label", "top", "left", "size"])
        for size, count in SAMPLES.items():
            images, labels, places = held_out(size)
            first = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
            for index in first[:count]:
                name = f"{size}/{labels[index]}/{index:03}.png"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(folder / name, optimize=True)
                table.writerow([name, labels[index], *(places[index] * PATCH), DIGIT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", choices=["linear_infsa", "pure_infsa"])
    for variant in parser.parse_args().variants:
        config = InfViTConfig(
            variant=variant, image_size=TRAINED, patch_size=PATCH, depth=4, embed_dim=128, num_heads=4, mlp_dim=256,
            num_classes=10, norm_eps=1e-5,
        )  # fmt: skip
        network, seconds = train(config)
        accuracy = save(network, seconds, ZOO / NAMES[variant].replace("digits", "canvases"))
        print(f"{variant}: {accuracy} of held-out digits, {seconds:.0f} s")
    save_samples(ZOO / "canvases-held-out")


if __name__ == "__main__":
    main()
