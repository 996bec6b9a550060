"""What sources count where nobody says so: as measured at some densities, between them in between."""

import pytest

from moa.search.calibrate import SOURCES
from moa.search.settings import default_weights


@pytest.mark.parametrize("density", [1e-3, 0.125, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0])
def test_every_density_has_weights_for_all_sources(density):
    weights = default_weights(density, SOURCES)
    assert sorted(weights) == sorted(SOURCES)
    assert default_weights(density, ["text"]) == {"text": weights["text"]}
    assert min(weights.values()) > 0
    assert weights["retrieval"] == 1.0


def test_between_densities_that_were_measured_weights_lie_between_theirs():
    quarter, half = default_weights(0.25, SOURCES), default_weights(0.5, SOURCES)
    assert quarter != half
    for source, weight in default_weights(0.375, SOURCES).items():
        assert weight == pytest.approx((quarter[source] + half[source]) / 2)


def test_beyond_them_the_nearest_holds():
    assert default_weights(0.01, SOURCES) == default_weights(0.125, SOURCES)
    assert default_weights(1.0, SOURCES) == default_weights(0.75, SOURCES)


def test_summaries_count_more_where_there_is_room_for_them():
    counted = [default_weights(density, SOURCES)["summary"] for density in (0.125, 0.25, 0.5, 0.75)]
    assert counted == sorted(set(counted))
