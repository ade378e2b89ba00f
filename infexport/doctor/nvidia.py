"""Checks of the GPU: its driver, CUDA, what measures its energy."""

from __future__ import annotations

from infexport.doctor.check import Check, State, reinstall
from infexport.doctor.facts import Facts
from infexport.system.dependencies import installed_version

CUDA, DRIVER = (13, 0), "580"
"""CUDA version that the extra `gpu` is built for, and the first driver that supports it."""


def gpu(facts: Facts) -> list[Check]:
    name, outcome = "GPU", facts.gpus()
    advice = f"needs an NVIDIA GPU and its driver, {DRIVER} or later, and in a container the right to use them"
    remedy = "docker run --gpus all IMAGE"
    if outcome.error:
        return [Check(name, "broken", outcome.error, advice, remedy)]
    if not outcome.found:
        return [Check(name, "no", "no NVIDIA driver: there is no nvidia-smi", advice, remedy)]
    found = [
        f"{one.name}, {one.size}, compute capability {one.capability}, driver {one.driver}" for one in outcome.found
    ]
    return [Check(name, "yes", "; ".join(found))]


def driver(facts: Facts) -> list[Check]:
    name, outcome = "CUDA", facts.trials["driver", ""]
    advice = f"needs driver {DRIVER} or later, which can do CUDA {CUDA[0]}"
    if outcome.error:
        state: State = "broken" if facts.gpus().found else "no"
        absent = "libcuda.so.1" in outcome.error
        return [Check(name, state, "the driver's libcuda.so.1 is not there" if absent else outcome.error, advice)]
    version, error = tuple(outcome.found["cuda"]), outcome.found.get("error", "")
    found = f"the driver can do CUDA {version[0]}.{version[1]}"
    if error:
        return [Check(name, "broken", f"{found}; {error}", advice)]
    if not outcome.found["count"]:
        return [Check(name, "no", f"{found}, and shows no GPU", "let CUDA see one", "unset CUDA_VISIBLE_DEVICES")]
    if version < CUDA:
        return [Check(name, "broken", found, advice)]
    return [Check(name, "yes", f"{found}, GPUs it shows: {outcome.found['count']}")]


def energy(facts: Facts) -> list[Check]:
    name, package = "energy", installed_version("nvidia-ml-py")
    if package is None:
        return [Check(name, "no", "nvidia-ml-py missing", "counts joules per image", "pip install 'nvidia-ml-py>=12'")]
    if not facts.gpus().found:
        return [Check(name, "no", f"nvidia-ml-py {package}; no NVIDIA GPU to measure", "needs an NVIDIA GPU")]
    outcome = facts.trials["import", "pynvml"]
    if outcome.error:
        return [reinstall(name, f"nvidia-ml-py {package}", outcome.error, "'nvidia-ml-py>=12'")]
    return [Check(name, "yes", f"joules per image: nvidia-ml-py {package}")]
