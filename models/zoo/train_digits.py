#!/usr/bin/env python3
"""Train the zoo: a linear, a pure and a softmax twin on scikit-learn's handwritten digits at 32×32.

    python models/zoo/train_digits.py linear_infsa pure_infsa softmax

Each is written to `models/zoo/digits-<name>`: weights, config with labels and preprocessing, training record and
accuracy. Weights and figures are deterministic for one version of torch on one kind of processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from infvit.config import InfViTConfig
from infvit.network import InfViT

ZOO = Path(__file__).resolve().parent
NAMES = {"linear_infsa": "digits-linear", "pure_infsa": "digits-pure", "softmax": "digits-softmax"}
RECIPE = {
    "dataset": "scikit-learn load_digits, 8x8 resized to 32x32 bicubic",
    "split": "train_test_split(test_size=0.25, stratify=labels, random_state=0)",
    "optimizer": "AdamW",
    "peak_learning_rate": 6e-4,
    "schedule": "one-cycle",
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "batch_size": 64,
    "epochs": 100,
    "augmentation": "shifts of up to 2 pixels",
    "seed": 0,
}
MEAN, STD = 0.5, 0.5
CARD = """# {name}

Digits at 32×32, attention `{variant}`: 4 layers, embed_dim 128, 4 heads, patch 8, {parameters:,} parameters.

**{accuracy:.2%}** of {images} held-out digits are right. Trained in {seconds:.0f} s on 2 CPU cores by
`python models/zoo/train_digits.py {variant}`; `training.json` has the whole recipe, `config.json` the labels and the
preprocessing. Data: scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0).

    infexport convert checkpoint models/zoo/{name}{option} --output bundle
"""


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """One of scikit-learn's digits, 8×8 with values 0 to 16, as uint8 of another size."""
    levels = (image * 255 / 16).round().astype(np.uint8)
    return np.asarray(Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC))


def digits(side: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images `[n, side, side, 3]` uint8 and labels `[n]`, then the held-out ones."""
    data = load_digits()
    images = np.stack([enlarged(image, side) for image in data.images])
    train, held_out, train_labels, held_out_labels = train_test_split(
        np.repeat(images[..., None], 3, axis=-1),
        data.target,
        test_size=0.25,
        stratify=data.target,
        random_state=0,
    )
    return train, train_labels, held_out, held_out_labels


def normalise(images: Tensor) -> Tensor:
    """uint8 `[B, 32, 32, 3]` to float32 `[B, 3, 32, 32]`, as the exported graph does it."""
    return (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image of the batch by −2 to 2 pixels each way, its edges replicated."""
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    offsets = torch.randint(0, 5, (len(pixels), 2), generator=generator).tolist()
    side = pixels.shape[-1]
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets, strict=True)])


def fit(
    network: InfViT, recipe: dict[str, Any], steps: int, epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]]
) -> float:
    """Train by a recipe on `steps` batches, pixels `[B, 3, H, W]` and labels, from `epoch`; return seconds."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["peak_learning_rate"], total_steps=steps)
    started = time.perf_counter()
    network.train()
    for number in range(1, recipe["epochs"] + 1):
        for pixels, labels in epoch():
            loss = torch.nn.functional.cross_entropy(network(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["gradient_clip"])
            optimizer.step()
            schedule.step()
        if number % 10 == 0:
            seconds = time.perf_counter() - started
            print(f"{network.config.variant} epoch {number}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    network.eval()
    return time.perf_counter() - started


def train(config: InfViTConfig) -> tuple[InfViT, float, float]:
    """Train a network; return it, its accuracy on the held-out digits and the seconds it took."""
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(0)
    images, labels, held_out, held_out_labels = (torch.from_numpy(array) for array in digits())
    pixels = normalise(images)
    network = InfViT(config)

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(pixels), generator=generator).split(RECIPE["batch_size"]):
            yield shifted(pixels[batch], generator), labels[batch]

    seconds = fit(network, RECIPE, RECIPE["epochs"] * -(-len(pixels) // RECIPE["batch_size"]), epoch)
    with torch.no_grad():
        predicted = network(normalise(held_out)).argmax(-1)
    return network, (predicted == held_out_labels).float().mean().item(), seconds


def write(network: InfViT, folder: Path, trained: dict[str, Any], card: str) -> None:
    """Write a checkpoint with its config, training record and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / "model.safetensors")
    config = network.config.to_dict() | {
        "layout": "reference",
        "labels": [str(digit) for digit in range(10)],
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "resize_mode": "exact",
        "resize_size": network.config.image_size,
        "crop_size": network.config.image_size,
        "interpolation": "bicubic",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(trained | {"torch": torch.__version__}, indent=2) + "\n")
    (folder / "README.md").write_text(card)


def save(network: InfViT, accuracy: float, seconds: float, folder: Path) -> None:
    images = len(digits()[2])
    trained = RECIPE | {
        "held_out_accuracy": round(accuracy, 4),
        "held_out_images": images,
        "seconds_on_2_cores": round(seconds),
    }
    card = CARD.format(
        name=folder.name,
        variant=network.config.variant,
        option=" --variant linear_infsa" if network.config.variant == "softmax" else "",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        accuracy=accuracy,
        images=images,
        seconds=seconds,
    )
    write(network, folder, trained, card)


def save_samples(folder: Path, per_class: int = 2) -> None:
    """Write the first held-out digits of every class as PNG, named by label."""
    folder.mkdir(parents=True, exist_ok=True)
    _, _, images, labels = digits()
    for digit in range(10):
        for i, index in enumerate(np.flatnonzero(labels == digit)[:per_class]):
            Image.fromarray(images[index]).save(folder / f"{digit}-{'abcdefgh'[i]}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", choices=list(NAMES))
    for variant in parser.parse_args().variants:
        config = InfViTConfig(
            variant=variant,
            image_size=32,
            patch_size=8,
            depth=4,
            embed_dim=128,
            num_heads=4,
            mlp_dim=256,
            num_classes=10,
            norm_eps=1e-5,
        )
        network, accuracy, seconds = train(config)
        save(network, accuracy, seconds, ZOO / NAMES[variant])
        print(f"{variant}: {accuracy:.2%} of held-out digits, {seconds:.0f} s")
    save_samples(ZOO / "digits-held-out")


if __name__ == "__main__":
    main()
