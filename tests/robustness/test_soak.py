"""Nothing grows with the number of predictions, and what looks for it finds what does."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soak

from infexport.bundle import open_bundle
from infexport.inference.runners.onnxruntime import OrtRunner

HERE = Path(__file__).parent
CALM, PLANTED = 1000, 700
"""Predictions: in ten rounds as they are, in eight more with what grows."""


def series(resident, descriptors=lambda n: 11, threads=lambda n: 3, rounds=200):
    at = range(100, 100 * rounds + 1, 100)
    return [soak.Sample(n, (size := int(resident(n))), size, descriptors(n), threads(n), 0) for n in at]


def noise(seed, scale=2**20):
    """What a heap does: steps up and down, each sample like the one before."""
    random, level = np.random.default_rng(seed), 0.0

    def at(n):
        nonlocal level
        level = 0.8 * level + random.normal(0, scale)
        return 300e6 + level

    return at


@pytest.mark.parametrize("seed", range(5))
def test_what_only_wavers_is_no_leak_and_what_grows_is_one(seed):
    calm = noise(seed)
    assert soak.judge(series(calm)).verdict == "no leak"
    calm = noise(seed)
    leak = soak.judge(series(lambda n: calm(n) + 1000 * n))
    assert leak.verdict == "leak"
    assert leak.slope == pytest.approx(1000, abs=3 * leak.error)


def test_pools_that_fill_in_the_warm_up_are_no_leak():
    assert soak.judge(series(lambda n: 300e6 - 2e8 * np.exp(-n / 500))).verdict == "no leak"


def test_one_file_or_thread_that_stays_is_a_leak():
    for kept in ({"descriptors": lambda n: 11 + (n > 15_000)}, {"threads": lambda n: 3 + (n > 15_000)}):
        assert soak.judge(series(lambda n: 3e8, **kept)).verdict == "leak"


def test_what_cannot_be_told_is_not_said():
    assert soak.judge(series(noise(0, 2**26), rounds=20)).verdict == "undecided"
    with pytest.raises(ValueError, match="expected at least 8"):
        soak.judge(series(lambda n: 3e8, rounds=9))


def test_the_error_is_what_slopes_of_noise_are():
    slopes, errors = zip(
        *(soak.line(range(150), [noise_at(n) for n in range(150)]) for noise_at in map(noise, range(200))), strict=True
    )
    assert 0.7 <= np.std(slopes) / np.mean(errors) <= 1.5


@pytest.fixture(scope="module")
def bundle(zoo_bundle):
    return zoo_bundle("digits-linear")


@pytest.fixture(scope="module")
def samples(bundle):
    """Of a process of its own: the heap of one that has run tests says nothing."""
    code = f"""
import os, sys, threading
sys.path.insert(0, {str(HERE)!r})
from soak import *
kept = []
def after(done):
    if done > {CALM}:
        kept.append(np.ones(2**22))  # 32 MiB
        kept.append(os.open(os.devnull, os.O_RDONLY))
        threading.Thread(target=threading.Event().wait, daemon=True).start()
samples = soak(Path({str(bundle)!r}), {CALM + PLANTED}, after=after)
print(json.dumps([asdict(one) for one in samples]), flush=True)
os._exit(0)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return [soak.Sample(**one) for one in json.loads(done.stdout)]


def test_nothing_grows(samples):
    calm = [one for one in samples if one.predictions <= CALM]
    steady = [one for one in calm if one.predictions >= CALM / 2]
    assert len(steady) >= 5
    assert steady[-1].threads == steady[0].threads
    assert steady[-1].held - steady[0].held < 32 * 2**20
    assert len({one.descriptors for one in calm}) == 1


def test_what_is_planted_is_found(samples):
    planted = [one for one in samples if one.predictions > CALM]
    samples = [samples[-len(planted) - 1], *planted]
    found = soak.judge(samples)
    assert found.verdict == "leak"
    each = np.diff([one.predictions for one in samples]).mean()
    assert found.slope * each == pytest.approx(32 * 2**20, rel=0.5)
    assert samples[-1].descriptors - samples[0].descriptors == len(planted)
    assert samples[-1].threads - samples[0].threads >= len(planted)
    # each of the three alone would have done
    for name in ("held", "descriptors", "threads"):
        others = {"held": 3 * 10**8, "descriptors": 11, "threads": 3}
        del others[name]
        assert soak.judge([dataclasses.replace(one, **others) for one in samples]).verdict == "leak", name


def test_a_session_keeps_nothing_of_the_shapes_it_has_met(bundle):
    with OrtRunner(open_bundle(bundle), "cpu") as runner:
        assert not runner._session.get_session_options().enable_mem_pattern
