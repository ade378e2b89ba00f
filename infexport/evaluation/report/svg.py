"""Figures of matplotlib as SVG that lives inside a page: in the page's colours and type, which change with its theme.

What is drawn in one of the colours below is a colour of the page's style sheet in the end.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, OURS, THEIRS, BAD, LINE = "#010203", "#010204", "#010205", "#010206", "#010207"
"""Placeholders: of words and axes, of the bundle, of PyTorch, of what is out of its bounds, and of grids."""
_PAGE = {INK: "currentColor", OURS: "var(--ours)", THEIRS: "var(--theirs)", BAD: "var(--bad)", LINE: "var(--line)"}

WIDTH, HEIGHT = 4.6, 3.0
"""Inches: as wide as a telephone, so that words are as large there as elsewhere."""


@contextmanager
def drawing() -> Iterator[Figure]:
    """A figure to draw on, in the page's placeholders."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    style: dict[Any, Any] = dict.fromkeys(inks, INK) | {
        "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.fonttype": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        yield Figure(figsize=(WIDTH, HEIGHT), layout="constrained")


def inline(figure: Figure, name: str, label: str) -> str:
    """An `svg` element, the same for the same figure.

    Args:
        figure: as `drawing` gave it, inside its block.
        name: which no other figure of the page has: ids are made of it.
        label: what it shows, for those who do not see it; plain words.
    """
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # its own style sheet would be the page's, and what else is not drawn says nothing there
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)
    for placeholder, colour in _PAGE.items():
        text = text.replace(placeholder, colour)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib writes one"
    start = f'<svg {view[0]} role="img" aria-label="{label}">'
    return start + re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :])
