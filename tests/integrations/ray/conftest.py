"""Ray, started once for the tests of a process."""

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
    """Numbers of the processes of ours in whose command line a text is."""
    return lambda text: [process for process, command in descendants().items() if text in command]
