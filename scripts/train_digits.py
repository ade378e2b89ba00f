#!/usr/bin/env python3
"""Train the zoo: a linear, a pure and a softmax twin on scikit-learn's handwritten digits at 32×32.

    python scripts/train_digits.py linear_infsa pure_infsa softmax

Each lands in `models/zoo/digits-<name>` as weights, config with labels and preprocessing, and how it was trained and
how well. Weights and figures are deterministic for one version of torch on one kind of processor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from infvit.config import InfViTConfig
from infvit.network import InfViT

ZOO = Path(__file__).resolve().parent.parent / "models" / "zoo"
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
`python scripts/train_digits.py {variant}`; `training.json` has the whole recipe, `config.json` the labels and the
preprocessing. Data: scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0).

    infexport convert checkpoint models/zoo/{name}{option} --output bundle
"""


def enlarged(image: np.ndarray) -> np.ndarray:
    """One of scikit-learn's digits, 8×8 with values 0 to 16, as 32×32 uint8."""
    levels = (image * 255 / 16).round().astype(np.uint8)
    return np.asarray(Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images `[n, 32, 32, 3]` uint8 and labels `[n]`, then the held-out ones."""
    data = load_digits()
    images = np.stack([enlarged(image) for image in data.images])
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
    """Every image of the batch moved by −2 to 2 pixels each way, its edges replicated."""
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    offsets = torch.randint(0, 5, (len(pixels), 2), generator=generator).tolist()
    side = pixels.shape[-1]
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets, strict=True)])


def train(config: InfViTConfig) -> tuple[InfViT, float, float]:
    """The trained network, its accuracy on the held-out digits and the seconds it took."""
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(0)
    images, labels, held_out, held_out_labels = (torch.from_numpy(array) for array in digits())
    pixels = normalise(images)
    network = InfViT(config)
    steps = RECIPE["epochs"] * -(-len(pixels) // RECIPE["batch_size"])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["peak_learning_rate"], total_steps=steps)
    started = time.perf_counter()
    for epoch in range(RECIPE["epochs"]):
        network.train()
        for batch in torch.randperm(len(pixels), generator=generator).split(RECIPE["batch_size"]):
            loss = torch.nn.functional.cross_entropy(network(shifted(pixels[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), RECIPE["gradient_clip"])
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"{config.variant} epoch {epoch + 1}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s")
    seconds = time.perf_counter() - started
    network.eval()
    with torch.no_grad():
        predicted = network(normalise(held_out)).argmax(-1)
    return network, (predicted == held_out_labels).float().mean().item(), seconds


def save(network: InfViT, accuracy: float, seconds: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / "model.safetensors")
    config = network.config.to_dict() | {
        "layout": "reference",
        "labels": [str(digit) for digit in range(10)],
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "resize_mode": "exact",
        "resize_size": 32,
        "crop_size": 32,
        "interpolation": "bicubic",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    trained = RECIPE | {
        "held_out_accuracy": round(accuracy, 4),
        "held_out_images": len(digits()[2]),
        "seconds_on_2_cores": round(seconds),
        "torch": torch.__version__,
    }
    (folder / "training.json").write_text(json.dumps(trained, indent=2) + "\n")
    (folder / "README.md").write_text(
        CARD.format(
            name=folder.name,
            variant=network.config.variant,
            option=" --variant linear_infsa" if network.config.variant == "softmax" else "",
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            accuracy=accuracy,
            images=trained["held_out_images"],
            seconds=seconds,
        )
    )


def save_samples(folder: Path, per_class: int = 2) -> None:
    """The first held-out digits of every class as PNG, named by label."""
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
