"""The picture of retrieval by length and depth."""

import math

import pytest

from moa.errors import InputError
from moa.evaluation.rows import Row
from moa.report.heat_maps import heat_maps

ROWS = [
    Row(method, density, task, length, 0.5, 10, 0.1, (1.0, 0.5, math.nan, 0.0, 1.0))
    for method, density in (("dense", 1.0), ("MoA half", 0.5))
    for task in ("passkey", "needle")
    for length in (1024, 1500)
    if (method, task, length) != ("dense", "needle", 1500)
]


def test_a_picture_with_a_panel_for_each_method_and_task(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    file = tmp_path / "new" / "map.png"
    heat_maps(ROWS, file)
    picture = image.imread(file)
    assert min(picture.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::97].tolist()}) > 10, "not blank"
    assert list(file.parent.iterdir()) == [file]


def test_without_a_retrieval_task_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="passkey"):
        heat_maps([Row("dense", 1.0, "perplexity", 1024, 30.0, 4, 0.1)], tmp_path / "map.png")
    assert not list(tmp_path.iterdir())
