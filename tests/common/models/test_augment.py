import torch
from torchvision.transforms import functional as transforms

from common.models import augment
from common.models.augment import _relight, random_views


def test_views_of_the_whole_photo_in_its_own_light_are_the_photo_or_its_mirror(monkeypatch):
    monkeypatch.setattr(augment, "LIGHT", 0.0)
    monkeypatch.setattr(augment, "HUE", 0.0)
    torch.manual_seed(0)
    squares = torch.randint(256, (16, 8, 8, 3), dtype=torch.uint8)
    views = random_views(squares, 1.0, 8)
    assert views.shape == squares.shape
    assert views.dtype == torch.float32
    same, mirrored = (
        (views - each).abs().amax((1, 2, 3)) < 0.01 for each in (squares.float(), squares.flip(2).float())
    )
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_a_crop_shows_a_part_of_the_photo_no_smaller_than_asked():
    torch.manual_seed(0)
    rows = torch.arange(100.0).view(1, 1, 100, 1).expand(200, 3, 100, 100)
    seen = augment._crop(rows, 0.36, 100)[:, 0, :, 50]
    span = seen[:, -1] - seen[:, 0]  # of rows; 99 of the whole photo
    assert span.min() >= 0.6 * 99 - 1
    assert span.min() < 0.65 * 99
    assert span.max() > 0.95 * 99
    assert seen.min() >= 0
    assert seen.max() <= 99


def test_a_view_may_be_smaller_than_the_photo(monkeypatch):
    monkeypatch.setattr(augment, "LIGHT", 0.0)
    monkeypatch.setattr(augment, "HUE", 0.0)
    rows = torch.arange(0, 160, 20, dtype=torch.uint8).view(1, 8, 1, 1).expand(3, 8, 8, 3)
    views = random_views(rows, 1.0, 4)
    assert views.shape == (3, 4, 4, 3)
    assert torch.allclose(views[0, :, 0, 0], torch.tensor([10.0, 50, 90, 130]), atol=0.01)  # the mean of two rows


def test_light_changes_as_torchvision_changes_it(monkeypatch):
    """One factor at a time, of values that nothing clips."""
    torch.manual_seed(0)
    photo = 60 + 60 * torch.rand(1, 3, 6, 6)
    for place, adjust in enumerate(
        (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation)
    ):
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[place] = 1.2
        drawn = iter(factors)
        monkeypatch.setattr(augment, "_uniform", lambda photos, low, high, drawn=drawn: torch.full((1,), next(drawn)))
        assert torch.allclose(_relight(photo), 255 * adjust(photo / 255, 1.2), atol=0.6)


def test_a_turn_of_the_hue_keeps_greys_and_luma(monkeypatch):
    drawn = iter([1.0, 1.0, 1.0, 0.05])
    monkeypatch.setattr(augment, "_uniform", lambda photos, low, high: torch.full((1,), next(drawn)))
    photo = torch.full((1, 3, 2, 2), 100.0)
    photo[0, 0, 0, 0] = 150
    turned = _relight(photo)
    assert torch.allclose(turned[0, :, 1, 1], photo[0, :, 1, 1], atol=0.1)
    luma = torch.tensor(augment.GREY)
    assert torch.allclose(luma @ turned[0, :, 0, 0], luma @ photo[0, :, 0, 0], atol=0.1)
    assert (turned[0, :, 0, 0] - photo[0, :, 0, 0]).abs().max() > 3
