"""One image in several shards: the single stream's answer, whoever is done first and whoever is lost."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, relative_error

from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.strips import ArrayRows, Source
from infexport.inference.runners.onnxruntime import OrtStages
from infexport.inference.streaming import stream
from infexport.inference.streaming.driver import select_stages
from infexport.inference.streaming.sharding import Lost, Shard, Sharded, exchanged_bytes, split_rows


class Here:
    """A `Team` in this process: a shard does what it was told when somebody waits for it, or before, as chance has it.

    Args:
        make: rows → shard.
        rows: of every shard.
        seed: of chance.
        losses: after so many calls of `tell`, a shard's tokens are gone.
    """

    def __init__(self, make, rows, seed, losses=()):
        self.make, self.rows, self.losses = make, rows, set(losses)
        self.chance, self.calls = random.Random(seed), itertools.count()
        self.shards = [make(part) for part in rows]
        self.queues = [[] for _ in rows]
        self.waiting = lambda done: None

    def share(self, value):
        return value

    def tell(self, shard, method, *arguments):
        if next(self.calls) in self.losses and self.shards[shard] is not None:
            self.shards[shard].close()
            self.shards[shard] = None
        task = {"shard": shard, "method": method, "arguments": arguments}
        self.queues[shard].append(task)
        while self.chance.random() < 0.5:
            self.work(self.chance.choice(self.queues))
        return task

    def work(self, queue):
        if not queue:
            return
        task = queue.pop(0)
        try:
            arguments = [self.value(x) if isinstance(x, dict) and "method" in x else x for x in task["arguments"]]
            shard = self.shards[task["shard"]]
            if shard is None:
                raise Lost
            task["value"] = getattr(shard, task["method"])(*arguments)
        except Lost as lost:
            task["value"] = lost

    def value(self, task):
        while "value" not in task:
            self.work(self.queues[task["shard"]])
        if isinstance(task["value"], Lost):
            raise task["value"]
        return task["value"]

    def replace(self, shard):
        self.queues[shard].clear()
        self.shards[shard] = self.make(self.rows[shard])


class Bundle:
    """One that is opened once, and an image: run at once, and in shards."""

    def __init__(self, path, image, chunk=40):
        self.bundle, self.chunk = open_bundle(path), chunk
        self.source = Source(ArrayRows(image), self.bundle.manifest.config.patch_size, "pad")
        self.stages = select_stages(self.bundle.manifest.stages, centrality=False)

    def __enter__(self):
        self.runner = OrtStages(self.bundle, "cpu", threads=1).__enter__()
        self.expected = stream(self.bundle, self.runner, self.source, chunk=self.chunk)
        return self

    def __exit__(self, *error):
        self.runner.__exit__(*error)

    def run(self, count, seed=0, losses=()):
        config = self.bundle.manifest.config
        self.team = Here(
            lambda rows: Shard(config, self.stages, self.runner, self.source, rows, self.chunk),
            split_rows(self.source.grid, count), seed, losses,
        )  # fmt: skip
        self.messages = []
        self.sharded = Sharded(self.stages, self.team, self.chunk, status=self.messages.append)
        return self.sharded.run()


@pytest.fixture(scope="module", params=["torchvision_linear", "torchvision_pure"])
def opened(request, golden_bundle):
    with Bundle(golden_bundle(request.param), synthetic_image(200, 120)) as bundle:
        yield bundle


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_shards(opened, count):
    found = opened.run(count)
    assert relative_error(found["logits"][0], opened.expected.logits) <= 1e-5
    assert relative_error(found["features"][0], opened.expected.features) <= 1e-5
    assert not opened.messages


@pytest.mark.parametrize("name", MODELS)
def test_every_layout(name, golden_bundle):
    with Bundle(golden_bundle(name), synthetic_image(90, 61), chunk=7) as opened:
        assert relative_error(opened.run(3)["logits"][0], opened.expected.logits) <= 1e-5


def test_several_terms_of_the_neumann_series(golden_bundle):
    path = golden_bundle("torchvision_pure", "--neumann-terms", 3)
    with Bundle(path, synthetic_image(90, 61), chunk=7) as opened:
        assert relative_error(opened.run(3)["logits"][0], opened.expected.logits) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 7), seed=st.integers(0, 1000))
def test_the_order_of_arrival_changes_no_bit(opened, count, seed):
    assert np.array_equal(opened.run(count, seed)["logits"], opened.run(count, seed=0)["logits"])


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 1000), moments=st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_a_shard_that_is_lost_changes_no_bit(opened, count, seed, moments):
    expected = opened.run(count)["logits"]
    assert np.array_equal(opened.run(count, seed, moments)["logits"], expected)


def test_lost_again_and_again_it_gives_up(opened):
    with pytest.raises(InfexportError, match="workers were lost 4 times"):
        opened.run(2, losses=range(100))


def test_what_is_exchanged_does_not_grow_with_the_image(golden_bundle):
    found = {}
    for side in (64, 256):
        with Bundle(golden_bundle("torchvision_linear"), synthetic_image(side, side)) as opened:
            opened.run(2)
            config = opened.bundle.manifest.config
            found[side] = opened.sharded.exchanged
            assert not any(shard.received for shard in opened.team.shards)
    assert found[64] == found[256] == exchanged_bytes(config, 2)


def test_keys_and_values_are_exchanged_once_a_layer(golden_bundle):
    with Bundle(golden_bundle("torchvision_pure"), synthetic_image(256, 256)) as opened:
        opened.run(3)
        config, tokens = opened.bundle.manifest.config, opened.source.tokens
        # keys and values, the keys alone in the last layer, go to each of the two others
        rows = 2 * tokens * (2 * config.depth - 1)
        assert sum(shard.received for shard in opened.team.shards) == rows * config.embed_dim * 4


@given(height=st.integers(1, 50), width=st.integers(1, 50), data=st.data())
def test_rows(height, width, data):
    rows = split_rows((height, width), data.draw(st.integers(1, height)))
    assert [row for part in rows for row in part] == list(range(height * width + 1))
    patches = [len(part) - (part.start == 0) for part in rows]
    assert all(count % width == 0 for count in patches)
    assert max(patches) - min(patches) <= width


def test_more_shards_than_rows_of_patches():
    with pytest.raises(InfexportError, match="8 shards of an image with 7 rows of patches"):
        split_rows((7, 100), 8)
