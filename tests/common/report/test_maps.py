import numpy as np

from common.report.maps import layout


def test_a_map_gives_each_photo_a_place_of_its_own():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:2], 20, axis=0)
    places = layout((centres + 0.05 * rng.normal(size=centres.shape)).astype(np.float32), 0, 8)
    assert len(np.unique(places, axis=0)) == 40
    assert places.min() >= 0
    assert places.max() < 8
    middles = places[:20].mean(0), places[20:].mean(0)
    assert np.linalg.norm(middles[0] - middles[1]) > 2  # two clusters lie apart
