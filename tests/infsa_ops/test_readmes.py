"""Each operator's README: its example runs, its table has what the ONNX schema has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import infsa_ops


def readme(operator: str) -> str:
    return (Path(infsa_ops.__file__).parent / operator / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("operator", infsa_ops.ALL)
def test_example_runs(operator):
    examples = re.findall(r"^```python\n(.*?)^```", readme(operator), flags=re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        exec(compile(example, f"{operator}/README.md", "exec"), {})


@pytest.mark.parametrize("operator", infsa_ops.ALL)
def test_table_is_the_schema(operator):
    found = importlib.import_module(f"infsa_ops.{operator}.function").OPERATOR
    schema = found.schema
    documented = re.findall(r"^\| (input|output|attribute) \| `(\w+)` \|", readme(operator), flags=re.MULTILINE)
    assert documented == [
        *(("input", parameter.name) for parameter in schema.inputs),
        *(("output", parameter.name) for parameter in schema.outputs),
        *(("attribute", name) for name in schema.attributes),
    ]
    assert readme(operator).startswith(f"# {found.name}\n")
