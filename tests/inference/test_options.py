"""Options of a run are checked where they are made: from Python as on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ZOO

from infexport import Predictor
from infexport.cli.providers import PROVIDERS
from infexport.errors import InfexportError
from infexport.inference.options import NEEDS, InferenceOptions
from infexport.inference.runners.onnxruntime import PROVIDERS as OF_ONNX_RUNTIME

DIGIT = min((ZOO / "digits-held-out").glob("*.png"))

IGNORED = [
    ({"execution": "whole", "scratch": Path("somewhere")}, "scratch would be ignored: execution is whole"),
    ({"execution": "whole", "chunk": 64}, "chunk would be ignored: execution is whole"),
    ({"execution": "whole", "tokens": "float16"}, "tokens would be ignored: execution is whole"),
    ({"execution": "stream", "batch_size": 2}, "batch_size would be ignored: execution is stream"),
    ({"provider": "cpu", "engine": "a100-fp16"}, "engine a100-fp16 with provider cpu"),
]


@pytest.mark.parametrize(("options", "words"), IGNORED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_would_be_ignored_is_refused_by_both(options, words, infexport, zoo_bundle):
    with pytest.raises(InfexportError, match=words):
        InferenceOptions(**options)
    with pytest.raises(InfexportError, match=words):
        Predictor("bundle", **options)
    typed = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert words in infexport("run-engine", zoo_bundle("digits-linear"), DIGIT, *typed, exit_code=2).stderr


WRONG = [
    ("edge", "padd"),
    ("execution", "streem"),
    ("execution", None),
    ("tokens", "float8"),
    ("provider", "cdua"),
    ("provider", 3),
    ("batch_size", 0),
    ("batch_size", None),
    ("batch_size", 2.5),
    ("memory", 0),
    ("memory", "2 GigaBites"),
    ("memory", 1.5),
    ("threads", -1),
    ("threads", 10**6),
    ("threads", "all"),
    ("chunk", -5),
    ("chunk", True),
    ("size", 0),
    ("size", "hugh"),
    ("size", None),
    ("size", 64.0),
    ("size", True),
    ("scratch", 7),
    ("engine", 7),
    ("centrality", "yes"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_an_option_does_not_take(name, value):
    with pytest.raises(InfexportError) as caught:
        Predictor("bundle", **{name: value})
    assert repr(value) in caught.value.summary
    assert "expected" in caught.value.details or "neither trained" in caught.value.summary


def test_texts_mean_what_they_mean_on_the_command_line():
    options = Predictor("bundle", size="64", memory="2GiB", scratch="here")._options
    assert (options.size, options.memory) == (64, 2**31)
    assert options.scratch == Path.cwd() / "here"
    options = InferenceOptions(size=np.int64(64), batch_size=np.int32(4), memory=np.uint64(10))
    assert [type(x) for x in (options.size, options.batch_size, options.memory)] == [int] * 3


@given(
    st.sampled_from(sorted(InferenceOptions.__dataclass_fields__)),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()),
        st.sampled_from(["trained", "native", "pad", "crop", "auto", "whole", "stream", "float16", "cpu", "engine"]),
    ),
)  # fmt: skip
def test_any_value_is_taken_or_refused_by_name(name, value):
    options, refused = None, ""
    try:
        options = InferenceOptions(**{name: value})
    except InfexportError as error:
        refused = error.summary
    if options is None:
        assert refused.startswith((f"{name} is", f"{name} would", "engine"))
    else:
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value)


def test_the_table_names_options():
    assert NEEDS.keys() <= InferenceOptions.__dataclass_fields__.keys()
    assert {*PROVIDERS} == {"auto", "engine", *OF_ONNX_RUNTIME}


def test_what_had_no_effect_is_told(infexport, zoo_bundle, tmp_path):
    """With `auto` an option of either way is right, but where no image was run that way somebody should know."""
    bundle = zoo_bundle("digits-linear")
    told = infexport("run-engine", bundle, DIGIT, "--chunk", 64, "--tokens", "float16").stderr
    assert "no image was streamed: chunk and tokens had no effect" in told
    assert "no effect" not in infexport("run-engine", bundle, DIGIT).stderr
    assert "no effect" not in infexport("run-engine", bundle, DIGIT, "--chunk", 64, "--execution", "stream").stderr
    told = infexport("run-engine", bundle, DIGIT, "--batch-size", 2, "--scratch", tmp_path).stderr
    assert "all images were streamed, one by one: batch_size had no effect" in told
    assert "no effect" not in infexport("run-engine", bundle, DIGIT, "--batch-size", 2).stderr
    told = infexport("validate", "accuracy", bundle, DIGIT.parent, "--no-pytorch", "--execution", "stream",
                     "--batch-size", 8, exit_code=2).stderr  # fmt: skip
    assert "batch_size would be ignored" in told
