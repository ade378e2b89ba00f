"""`--memory` is kept for every kind of output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from infexport.evaluation.synthetic_images import synthetic_image

PEAK = """
import sys
from infexport.__main__ import main
from infexport.system.host import peak_memory
try:
    main()
finally:
    print("peak", peak_memory(), file=sys.stderr)
"""


def run(*arguments):
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("images", "asked"),
    [(1, ("--heatmaps", "maps")), (1, ("--heatmaps", "maps", "--heatmap-detail", "heads")),
     (24, ("--centrality", "-o", "out.npz"))],
    ids=["a map", "a map of every head", "numbers of many"],
)  # fmt: skip
def test_the_least_that_is_accepted_is_enough(images, asked, zoo_bundle, tmp_path):
    Image.fromarray(synthetic_image(1000, 1100)).save(tmp_path / "0.png")
    for number in range(1, images):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    options = [tmp_path / word if word in ("maps", "out.npz") else word for word in asked]
    command = ("run-engine", zoo_bundle("canvases-linear"), *files, "--size", "native", *options, "--scratch",
               tmp_path / "scratch", "--threads", 1)  # fmt: skip
    code, told = run(*command, "--memory", "5MiB")
    assert code == 1
    least = int(re.search(r"the smallest that would do: --memory (\d+)MiB", told)[1])
    code, told = run(*command, "--memory", f"{least}MiB")
    assert code == 0, told
    assert int(re.search(r"peak (\d+)", told)[1]) <= least * 2**20
