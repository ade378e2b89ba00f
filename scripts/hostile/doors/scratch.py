"""What a streamed run that was interrupted left: run.json, state.npz and tokens, changed by somebody."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from hostile.cases import Case
from hostile.doors.folder import remove
from hostile.mutate import INTERESTING, mutate_bytes, mutate_json
from hostile.seeds import copy_tree
from infexport.options import InferenceOptions
from infexport.predictor import Predictor
from infexport.run import Listener


class Interrupting(Listener):
    """Ends the run once some of it is recorded."""

    def sweep(self, file: str, stage: int, done: int, total: int) -> None:
        if stage >= 3:
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
    for _ in range(chance.choice((1, 1, 2))):
        _change(case, chance.choice(sorted(folder.iterdir())), folder)
    more = chance.choice(((), (), ("--json",), ("--clean",)))
    command = (
        "run-engine",
        case.seeds.bundle,
        case.seeds.image,
        "--size",
        "native",
        "--execution",
        "stream",
        "--threads",
        "1",
    )
    return lambda: case.cli(*command, "--chunk", "16", "--scratch", root, *more)


def _change(case: Case, file: Path, folder: Path) -> None:
    chance = case.chance
    victim = case.given / "victim"
    victim.write_bytes(b"precious")
    kind = chance.randrange(8)
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
    elif kind in (4, 5, 6) and (folder / "state.npz").is_file():
        _state(case, folder / "state.npz")
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
