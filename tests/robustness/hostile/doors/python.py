"""Options and images given from Python: an error by name, or the answer that these options mean."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hostile.cases import Case
from hostile.mutate import TEXTS
from hostile.watch import Violation
from infexport.inference.prediction import Prediction
from infexport.inference.predictor import Predictor

RIGHT: dict[str, tuple[Any, ...]] = {
    "size": ("trained", "native", 64, "64", 32, np.int64(64)),
    "edge": ("pad", "crop"),
    "execution": ("auto", "whole", "stream"),
    "memory": (None, "2GiB", 2**31, np.int32(2**30)),
    "chunk": (None, 1, 16, 1024),
    "tokens": ("float32", "float16"),
    "provider": ("auto", "cpu"),
    "batch_size": (1, 2, 8),
    "threads": (1,),
    "centrality": (False, True),
}
WRONG = (
    None, -1, 0, 1, 2.5, float("nan"), True, "", "padd", "streem", "64x64", "2 GB of it", "cdua", b"cpu", [], {},
    10**30, np.float32(1), np.array([1]), Path("x"), object(), "\0", "a100-fp16", "engine", "tensorrt",
)  # fmt: skip
TOLERANCE = 2e-2
"""Share of the norm; float16 tokens are 1e-3. Another size, edge or image is off by more."""


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    options: dict[str, Any] = {"threads": 1}
    for name in chance.sample(sorted(RIGHT), chance.randrange(len(RIGHT))):
        options[name] = chance.choice(RIGHT[name])
    if chance.random() < 0.4:
        options["scratch"] = chance.choice((case.made / "scratch", str(case.made / "scratch")))
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        known = [*inspect.signature(Predictor).parameters][2:]
        name = chance.choice(known)
        # a folder may have any name, anywhere
        options[name] = chance.choice(
            [value for value in (*WRONG, *TEXTS) if name != "scratch" or not isinstance(value, str | Path)]
        )
    items, truths = _items(case)
    sent = chance.random() < 0.3
    return lambda: _act(case, options, items, truths, sent)


def _items(case: Case) -> tuple[list[Any], list[Any]]:
    """Images in every form, odd things between them, and the pixels of each; None where it is no image."""
    chance, items, truths = case.chance, list[Any](), list[Any]()
    for _ in range(chance.randrange(5)):
        side = chance.choice(((64, 64), (64, 64), (17, 40), (9, 8)))
        pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (*side, 3), np.uint8)
        file = case.given / f"{len(items)}.png"
        Image.fromarray(pixels).save(file)
        items.append(chance.choice((file, str(file), pixels, Image.fromarray(pixels), f"file://{file}")))
        truths.append(pixels)
        if chance.random() < 0.4:
            odd = (None, b"x", 3, "", "a\0", case.given, "/dev/zero", object(), np.zeros((2, 2)), "nosuch://x", [])
            items.append(chance.choice(odd))
            truths.append(None)
    return items, truths


def _act(case: Case, options: dict[str, Any], items: list[Any], truths: list[Any], sent: bool) -> int | None:
    predictor = case.reads(lambda: Predictor(case.seeds.bundle, **options))
    if sent:
        predictor = pickle.loads(pickle.dumps(predictor))
    with predictor:
        rows = predictor.predict(items)
    if len(rows) != len(items):
        raise Violation("answer", f"{len(rows)} rows for {len(items)} items: {options}")
    plain = {name: options[name] for name in ("size", "edge") if name in options}
    told = f"{options!r:.300}"
    for row, pixels in zip(rows, truths, strict=True):
        if pixels is None and isinstance(row, Prediction):
            raise Violation("answer", f"an answer for no image: {told}")
        if isinstance(row, Prediction):
            _check(case, row, pixels, plain, told)
            if options.get("execution", "auto") not in ("auto", row.execution.partition(",")[0]):
                raise Violation("answer", f"run as {row.execution}: {told}")
            if (options.get("scratch") is not None) != ("on disk" in row.execution):
                raise Violation("answer", f"run as {row.execution}: {told}")
            if (row.centrality is None) == bool(options.get("centrality")):
                raise Violation("answer", f"centrality {row.centrality is not None}: {told}")
    return 0


def _check(case: Case, row: Prediction, pixels: Any, plain: dict[str, Any], told: str) -> None:
    reference = case.seeds.once(f"plain {plain}", lambda: Predictor(case.seeds.bundle, threads=1, **plain))
    (expected,) = reference.predict([pixels])
    if not isinstance(expected, Prediction):
        raise Violation("answer", f"an answer where plain options have none: {told}")
    difference = np.linalg.norm(row.logits - expected.logits) / np.linalg.norm(expected.logits)
    if not difference <= TOLERANCE or row.grid != expected.grid:
        raise Violation("answer", f"differs by {difference:.1e}, grid {row.grid}: {told}")
