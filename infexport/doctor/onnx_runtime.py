"""Checks of what runs bundles: ONNX Runtime and its providers."""

from __future__ import annotations

from infexport.doctor.check import Check, reinstall
from infexport.doctor.facts import Facts, installed, versions
from infexport.system.dependencies import installed_version


def runtime(facts: Facts) -> list[Check]:
    name = "cpu"
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        found = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
        extra = "gpu" if facts.gpus().found else "cpu"
        remedy = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infexport[{extra}]'"
        return [Check(name, "broken", found, "keep one", remedy)]
    if missing := facts.lacks(name, "cpu"):
        return [missing]
    outcome = facts.trials["provider", name]
    if outcome.error:
        return [reinstall(name, versions(facts.of("cpu")), outcome.error, "'infexport[cpu]'")]
    others = [one for one in facts.trials["offered", ""].found[1:] if not one.startswith("CPU")]
    offers = f"; it also offers {', '.join(others)}" if others else ""
    return [Check(name, "yes", f"ran a graph: {versions(facts.of('cpu'))}{offers}")]


def providers(facts: Facts) -> list[Check]:
    gpu_build = "pip uninstall -y onnxruntime; pip install 'infexport[gpu]'"
    return [
        _provider(facts, "cuda", "gpu", "CUDA 13 and cuDNN 9 on LD_LIBRARY_PATH", gpu_build),
        _provider(facts, "tensorrt", "tensorrt", "what cuda needs", f"{gpu_build} 'infexport[tensorrt]'"),
        _provider(facts, "tensorrt-rtx", "tensorrt-rtx", "", "pip install 'infexport[tensorrt-rtx]'"),
    ]


def _provider(facts: Facts, name: str, extra: str, needs: str, remedy: str) -> Check:
    """A provider that was opened and run, or why it was not: without a GPU none of these can be."""
    outcome = facts.trials["provider", name]
    if not outcome.error:
        return Check(name, "yes", f"ran a graph on {outcome.found}")
    there = bool(facts.gpus().found)
    absent = [one.text for one in facts.of(extra) if installed(one) is None]
    found = f"{', '.join(absent)} missing" if absent else _short(outcome.error)
    if there and not absent:
        return Check(name, "broken", found, f"needs {needs}" if needs else "", remedy)
    needed = ", ".join(filter(None, ["" if there else "an NVIDIA GPU", needs]))
    return Check(name, "no", found, f"needs {needed}" if needed else "", remedy if absent else "")


def _short(text: str) -> str:
    """The last thing a library says, without the paths before it."""
    return text.rpartition("with error: ")[2] if "with error: " in text else text
