"""Batches of images of one shape, for what runs whole images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from infexport.images.preprocess import Fitted


class Batches:
    """Groups of at most `size` images of equal shape. Fewer than `4 * size` images wait at any time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[tuple[int, ...], list[tuple[int, Fitted]]] = defaultdict(list)

    def add(self, index: int, image: Fitted) -> Iterator[list[tuple[int, Fitted]]]:
        """Add an image; yield the batch that is to be run now, if any."""
        group = self._waiting[image.pixels.shape]
        group.append((index, image))
        if len(group) == self._size:
            yield self._waiting.pop(image.pixels.shape)
        elif sum(map(len, self._waiting.values())) >= 4 * self._size:
            yield self._waiting.pop(max(self._waiting, key=lambda shape: len(self._waiting[shape])))

    def rest(self) -> Iterator[list[tuple[int, Fitted]]]:
        """Yield the groups that are still waiting."""
        yield from self._waiting.values()
