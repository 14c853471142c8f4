import numpy as np
import pytest
from PIL import Image

from common.data import decode
from common.data.decode import decode_photo
from tests.common.data.files import encoded

PIXELS = np.random.default_rng(0).integers(256, size=(9, 7, 4), dtype=np.uint8)
BRIGHT = np.where(np.arange(4) < 3, 250, PIXELS).astype(np.uint8)
GREY = np.sort(PIXELS[..., 0], axis=None)[::-1].reshape(9, 7)  # brightest first: strips differ


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.fromarray(PIXELS), "PNG", {}),
        (Image.fromarray(BRIGHT), "PNG", {}),
        (Image.fromarray(PIXELS).convert("LA"), "PNG", {}),
        (Image.fromarray(GREY).quantize(8), "PNG", {"transparency": 3}),
        (Image.fromarray(PIXELS[..., :3]), "PNG", {"transparency": tuple(PIXELS[4, 4, :3].tolist())}),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", {}),
        (Image.fromarray(GREY.astype(np.uint16) * 16), "TIFF", {}),
        (Image.fromarray(GREY.astype(np.float32) / 255), "TIFF", {}),
    ],
)
def test_a_large_image_is_converted_in_strips_as_a_small_one_is(image, kind, options, monkeypatch):
    data = encoded(image, kind, **options)
    whole = np.asarray(decode_photo(data))
    for pixels in (1, 20):  # strips of one row, and of two
        monkeypatch.setattr(decode, "STRIP_PIXELS", pixels)
        assert (np.asarray(decode_photo(data)) == whole).all()
    assert whole.shape == (9, 7, 3)
    assert whole.std() > 0
