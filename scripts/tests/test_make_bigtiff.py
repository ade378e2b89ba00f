"""The TIFF that make_bigtiff writes has the pixels that every reader finds."""

import itertools

import numpy as np
import tifffile
from make_bigtiff import photographs, write

from infexport.images.decode import read_image
from infexport.images.strips import open_rows


def test_make_bigtiff_writes_what_it_says(tmp_path):
    photos = photographs([])
    write(tmp_path / "big.tif", 700, 1100, photos, "deflate")
    with tifffile.TiffFile(tmp_path / "big.tif") as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
    rows = open_rows(tmp_path / "big.tif")
    image = np.concatenate([rows.read(y, min(y + 100, 700)) for y in range(0, 700, 100)])
    assert image.shape == (700, 1100, 3)
    assert np.array_equal(image, read_image(tmp_path / "big.tif"))
    places = [image[:188, x : x + 188] for x in (0, 512)] + [image[512:700, x : x + 188] for x in (0, 512)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(places, 2))
