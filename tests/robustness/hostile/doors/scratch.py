"""What a streamed run that was interrupted left: run.json, state.npz and tokens, changed by somebody."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hostile.cases import Case
from hostile.doors.folder import remove
from hostile.mutate import INTERESTING, mutate_bytes, mutate_json
from hostile.seeds import copy_tree
from hostile.watch import Violation
from infexport.inference.options import InferenceOptions
from infexport.inference.predictor import Predictor
from infexport.system.progress import ProgressEvent, ProgressListener, StageProgress


class Interrupting(ProgressListener):
    """Ends the run once some of it is recorded."""

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, StageProgress) and event.stage >= 3:
            raise KeyboardInterrupt


def interrupted(case: Case) -> Path:
    root = case.seeds.folder / "interrupted"
    if not root.exists():
        options = InferenceOptions(execution="stream", scratch=root, chunk=16, size="native", threads=1)
        with suppress(KeyboardInterrupt):
            Predictor.of(case.seeds.opened, options).predict([case.seeds.image], Interrupting())
    return root


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    root = case.made / "scratch"
    copy_tree(case.seeds.once("interrupted", lambda: interrupted(case)), root)
    (folder,) = root.iterdir()
    for _ in range(chance.choice((0, 1, 1, 2))):
        files = sorted(folder.iterdir())
        tokens = [file for file in files if file.name == "tokens"]
        _change(case, chance.choice(tokens if tokens and chance.random() < 0.4 else files), folder)
    if chance.random() < 0.05:
        shutil.rmtree(root)
        root.write_text("no folder")
    image = case.seeds.image
    if chance.random() < 0.2:  # another image, in the place of the first as far as its size and time tell
        image = case.given / "other.bmp"
        pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (72, 100, 3), np.uint8)
        Image.fromarray(pixels).save(image)
    output = case.made / "out.npz"
    more = chance.choice(((), (), ("--json",), ("--clean",), ("--edge", "crop"), ("--tokens", "float16")))
    words = ("--size", "native", "--threads", "1", "-o", output)
    command = ("run-engine", case.seeds.bundle, image, *words, "--execution", "stream", "--chunk", "16")
    return lambda: _act(case, (*command, "--scratch", root, *more), output, (*command, *more))


def _act(case: Case, command: tuple[Any, ...], output: Path, fresh: tuple[Any, ...]) -> int | None:
    code = case.cli(*command)
    if code:
        return code
    with np.load(output) as arrays:
        found = arrays["logits"]
    output.unlink()
    case.cli(*fresh)  # with tokens in memory, nothing is gone on with
    with np.load(output) as arrays:
        if not np.array_equal(found, arrays["logits"]):
            raise Violation("answer", f"not what a fresh run says: {command[3:]!r:.400}")
    return 0


def _change(case: Case, file: Path, folder: Path) -> None:
    chance = case.chance
    victim = case.given / "victim"
    victim.write_bytes(b"precious")
    kind = chance.randrange(10)
    if kind == 0:
        remove(file)
    elif kind == 1:
        remove(file)
        file.symlink_to(victim)
    elif kind == 2:
        name = chance.choice(("run.json.partial", "state.npz.partial", "other"))
        remove(folder / name)
        (folder / name).symlink_to(victim)
    elif kind == 3:
        remove(place := folder / chance.choice(("sub", "run.json.partial")))
        place.mkdir()
    elif kind == 4 and file.name == "run.json":
        with suppress(ValueError):  # changed before
            file.write_bytes(mutate_json(chance, json.loads(file.read_bytes())))
    elif kind in (4, 5, 6) and file.name != "tokens" and (folder / "state.npz").is_file():
        _state(case, folder / "state.npz")
    elif (kind in (8, 9) or file.name == "tokens") and file.is_file() and (content := file.read_bytes()):
        # of the same size, cut, longer, or of another block
        start = chance.randrange(len(content))
        stop = min(len(content), start + chance.choice((1, 100, 4096)))
        file.write_bytes(chance.choice((
            content[:start] + bytes(stop - start) + content[stop:],
            content[:start],
            content + content[start:stop],
            content[:start] + content[: stop - start] + content[stop:],
        )))  # fmt: skip
    elif file.is_file():
        file.write_bytes(mutate_bytes(chance, file.read_bytes(), head=chance.choice((0, 200))))


def _state(case: Case, file: Path) -> None:
    """A position that none can be at."""
    chance = case.chance
    if not (content := file.read_bytes())[32:]:
        return  # changed before
    try:
        with np.load(io.BytesIO(content[32:])) as found:
            arrays = {name: found[name] for name in found.files}
    except Exception:  # changed before, too
        return
    name = chance.choice(sorted(arrays))
    kind = chance.randrange(6)
    if kind == 0:
        stages, rows = (0, -1, 3, 9, 10, 99, *INTERESTING), (0, -1, 5, 117, 10**6, *INTERESTING)
        at = [chance.choice(stages), chance.choice(rows)]
        arrays["at"] = np.array([max(-(2**63), min(2**63 - 1, number)) for number in at])
    elif kind == 1:
        arrays[name] = np.array([{"a": 1}], object)  # a pickle, which must not be read
    elif kind == 2:
        value = arrays[name]
        none = np.full(value.shape, np.nan)
        arrays[name] = chance.choice((none, value.reshape(-1)[:0], np.zeros(3), np.array(["x"])))
    elif kind == 3:
        del arrays[name]
    elif kind == 4:
        arrays[chance.choice(("sums/x", "other/x", "added/tokens", "../x", "/"))] = arrays.pop(name)
    else:
        arrays[name] = arrays[name].astype(chance.choice(("complex64", "U9", "bool", "int8")))
    made = io.BytesIO()
    np.savez(made, **arrays)
    # its digest stays: who gives it another owns the folder, and so the run
    file.write_bytes(content[:32] + made.getvalue())
