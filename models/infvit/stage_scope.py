"""The tokens that a stage of a streamed run is called for."""

from __future__ import annotations

from enum import StrEnum


class StageScope(StrEnum):
    """The tokens that a stage is called for.

    Attributes:
        ONCE: called once, with no inputs, for the class token.
        IMAGE: strips of the image.
        TOKENS: chunk by chunk, the class token among them.
        PAIRS: a chunk of the first input with every chunk of the other tokens; the outputs of a token are added.
        CLASS_TOKEN: the class token alone, when the sums over all tokens are known.
    """

    ONCE = "nothing"
    IMAGE = "image"
    TOKENS = "tokens"
    PAIRS = "pairs"
    CLASS_TOKEN = "class_token"

    @property
    def runs_once(self) -> bool:
        """Tell whether a stage is called once per image."""
        return self in (StageScope.ONCE, StageScope.CLASS_TOKEN)

    @property
    def is_pairwise(self) -> bool:
        """Tell whether a stage is called for all pairs of tokens."""
        return self is StageScope.PAIRS

    def max_rows(self, chunk: int) -> int:
        """Return the largest number of tokens per call of a stage, for chunks of `chunk` tokens."""
        return 1 if self.runs_once else chunk * PAIR_CHUNKS if self.is_pairwise else chunk


PAIR_CHUNKS = 4
"""Chunks in a block of queries or keys: a block of keys is read for every block of queries."""
