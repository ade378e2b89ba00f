"""Fixtures with Ray, which is started once per test process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from children import descendants

from infexport.integrations.ray.cluster import connected


@pytest.fixture(scope="session")
def ray() -> Iterator[ModuleType]:
    with connected("local") as module:
        yield module


@pytest.fixture
def processes() -> Callable[[str], list[int]]:
    """Function: text → ids of descendant processes whose command line contains it."""
    return lambda text: [process for process, command in descendants().items() if text in command]
