"""Trials in processes of their own, all at the same time: they may crash or hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infexport.doctor.check import told
from infexport.errors import InfexportError
from infexport.system.dependencies import MODULES, Requirement, installed_version
from infexport.system.gpus import gpus
from infexport.system.workers import ask, worker_command

Trial = tuple[str, str]

LIMIT = 60.0
"""Seconds that a group of trials may take; a builder of TensorRT takes several."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a trial: its result, or the reason why there is none."""

    found: Any = None
    error: str = ""


class Trials:
    """Trials of `doctor.worker` in processes of their own, and nvidia-smi, all at the same time."""

    def __init__(self, packages: Sequence[Requirement]) -> None:
        modules = {MODULES.get(one.name): None for one in packages if installed_version(one.name) is not None}
        imports: list[Trial] = [("import", module) for module in modules if module]
        heavy = [trial for trial in imports if trial[1] in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")]
        providers: list[Trial] = [("provider", name) for name in ("cpu", "cuda", "tensorrt", "tensorrt-rtx")]
        groups: list[list[Trial]] = [
            heavy,
            [*(trial for trial in imports if trial not in heavy), ("pillow", ""), ("vips", ""), ("openslide", "")],
            [("offered", ""), ("driver", ""), *providers],
            [("builder", "tensorrt-rtx")],
            [("builder", "tensorrt")],
        ]
        self._groups = [(set(group), Started(lambda group=group: outcomes(group))) for group in groups]  # type: ignore[misc]
        self.gpus = Started(gpus)

    def __getitem__(self, trial: Trial) -> Outcome:
        for group, started in self._groups:
            if trial in group:
                found: dict[Trial, Outcome] = started.result(2 * LIMIT)
                return found[trial]
        return Outcome(error="it is not installed")


class Started:
    """A function in a thread that nothing waits for longer than it wants: not even the end of this process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function, self._result, self._error = function, None, ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except Exception as error:
            self._error = told(error)

    def result(self, limit: float) -> Any:
        """Result of the trial.

        Raises:
            InfexportError: it raised, or is not done.
        """
        self._thread.join(limit)
        if self._thread.is_alive():
            raise InfexportError(f"no answer within {limit:g} s")
        if self._error:
            raise InfexportError(self._error)
        return self._result


def outcomes(trials: Sequence[Trial]) -> dict[Trial, Outcome]:
    """Return the outcome of every trial; after a trial that ends its process, the others continue in another."""
    found: dict[Trial, Outcome] = {}
    left, end = list(trials), time.monotonic() + LIMIT
    while left:
        # one that hangs leaves the others time
        limit = max(1.0, (end - time.monotonic()) / (2 if len(left) > 1 else 1))
        done, last, reason = _attempt(left, limit)
        found |= done
        if last is not None:
            found[last] = Outcome(error=f"{reason}, by {' '.join(filter(None, last))}")
        elif not done:  # it did not even begin
            found |= dict.fromkeys(left, Outcome(error=reason or "it gives no answer"))
        left = [trial for trial in left if trial not in found]
    return found


def _attempt(trials: Sequence[Trial], limit: float) -> tuple[dict[Trial, Outcome], Trial | None, str]:
    """Return the outcomes of one process, the trial in which it ended, and how."""
    found: dict[Trial, Outcome] = {}
    begun: list[Trial] = []

    def heard(message: dict[str, Any]) -> None:
        if "trying" in message:
            begun.append(trials[message["trying"]])
        else:
            found[trials[message["tried"]]] = Outcome(message.get("found"), message.get("failed", ""))

    reason = ""
    try:
        ask(worker_command("infexport.doctor.worker"), {"trials": list(trials)}, heard, limit)
    except (InfexportError, OSError, ValueError) as error:
        reason = told(error)
    return found, next((trial for trial in begun if trial not in found), None), reason
