"""Cats and dogs drawn with Pillow, for runs where no photos are available.

Ears, muzzle, eyes and whiskers tell them apart, some of them ambiguous on purpose (cats with folded ears, dogs with
pointed ones). Fur, pose, lighting and clutter come from the same ranges for both; only the setting gives a hint, as in
real photos: dogs are more often on a meadow, cats in a room.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from common.data.brush import Brush, Colour, shade, vary_colour
from common.parallel import parallel_map
from common.storage import atomic_write

VERSION = "1"  # of the drawing: another one is another data set
MARKER = "SYNTHETIC.txt"  # lies in a folder of synthetic images, so that they never pass for real photos
COUNT = 2000
SIZE = 192  # pixels of a finished image
CANVAS = 288  # pixels while drawing; downsampling smooths the edges
FURS = ("#2b2b2e", "#6f6f76", "#a9a9ad", "#e9e4da", "#d98b3a", "#b5652b", "#7a4a2a", "#caa472", "#8d7a66", "#f3d9ae")
EYES = ("#7fae3a", "#c9a227", "#5fa3c7", "#8a5a2b", "#4d7d4d")
OBJECTS = ("#c0392b", "#2e86c1", "#28b463", "#f1c40f", "#8e44ad", "#e67e22", "#ecf0f1", "#34495e", "#d98880", "#76d7c4")
SETTINGS = ("gradient", "room", "meadow", "carpet")
SETTING_PROBABILITIES = {"cat": (0.2, 0.5, 0.1, 0.2), "dog": (0.2, 0.1, 0.5, 0.2)}


def draw_dataset(folder: Path, count: int = COUNT, seed: int = 0) -> Path:
    """Draws `count` images, every second one a cat, into `folder/cat` and `folder/dog`; returns `folder`.

    The same count and seed give the same images. The folder appears complete or not at all.
    """
    try:
        with atomic_write(folder) as temporary:
            for name in ("cat", "dog"):
                (temporary / name).mkdir(parents=True)
            (temporary / MARKER).write_text(f"Drawn by common/data/synthetic.py: {count} images, seed {seed}.\n")

            def save(index: int) -> None:
                kind = ("cat", "dog")[index % 2]
                drawn = draw_photo(kind, np.random.default_rng([seed, index]))
                drawn.save(temporary / kind / f"{kind}.{index // 2:04d}.jpg", quality=88)

            for _ in tqdm(parallel_map(save, range(count)), "drawing cats and dogs", count, unit=" images"):
                pass
    except OSError:
        if not is_synthetic(folder):  # another process has drawn them in the meantime
            raise
    return folder


def is_synthetic(folder: Path) -> bool:
    """Whether the images in `folder` were drawn here."""
    return (folder / MARKER).exists()


def draw_photo(kind: str, rng: np.random.Generator) -> Image.Image:
    """One RGB drawing, 192 x 192, of a "cat" or a "dog" somewhere in a scene."""
    image = _background(kind, rng)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        _draw_object(draw, rng)
    _animal(draw, kind, rng)
    if rng.random() < 0.25:  # something lies in front
        _draw_object(draw, rng, low=0.04, high=0.1)
    return _photograph(image, rng)


def _animal(draw: ImageDraw.ImageDraw, kind: str, rng: np.random.Generator) -> None:
    pose = rng.choice(["portrait", "sitting", "standing", "lying"], p=[0.35, 0.25, 0.2, 0.2])
    low, high = (0.19, 0.3) if pose == "portrait" else (0.1, 0.16)
    size = CANVAS * rng.uniform(low, high)
    mirrored = rng.random() < 0.5
    forward = -0.15 if pose in ("standing", "lying") else 0.0  # the body lies behind the head
    x = 0.5 + (forward if not mirrored else -forward) + rng.uniform(-0.12, 0.12)
    y = {"portrait": 0.5, "sitting": 0.35, "standing": 0.38, "lying": 0.52}[pose] + rng.uniform(-0.08, 0.08)
    brush = Brush(draw, (CANVAS * x, CANVAS * y), size, rng.normal(0, 0.14), mirrored)
    fur = vary_colour(rng.choice(FURS), rng, 14)
    second = shade(fur, rng.uniform(0.55, 0.75)) if rng.random() < 0.5 else vary_colour(rng.choice(FURS), rng, 14)
    pattern = rng.choice(["plain", "stripes", "patches"], p=[0.45, 0.3, 0.25])
    _body(brush, pose, kind, fur, second, pattern, rng)
    _head(brush, kind, fur, second, pattern, rng)


def _body(
    brush: Brush, pose: str, kind: str, fur: Colour, second: Colour, pattern: str, rng: np.random.Generator
) -> None:
    dark = shade(fur, 0.82)
    tail = 0.16 if kind == "cat" else rng.uniform(0.16, 0.3)
    curl = rng.uniform(-0.6, 0.6)
    if pose == "portrait":
        brush.ellipse(dark, (0, 2.0), (1.25, 1.35))
        brush.ellipse(fur, (0, 1.9), (1.05, 1.2))
    elif pose == "sitting":
        brush.line(dark, tail, (1.0, 3.3), (1.9, 3.0 + curl), (2.2, 2.2 + curl))
        brush.ellipse(dark, (0, 2.5), (1.3, 1.35))
        brush.ellipse(fur, (0, 1.9), (0.95, 1.4))
        for side in (-0.42, 0.42):
            brush.ellipse(shade(fur, 0.92), (side, 2.9), (0.28, 1.0))
            brush.ellipse(second, (side, 3.75), (0.36, 0.22))
    elif pose == "standing":
        brush.line(dark, tail, (3.6, 0.9), (4.3, 0.3 + curl), (4.6, -0.6 + curl))
        for leg in (0.9, 1.4, 3.0, 3.5):
            brush.line(dark, 0.42, (leg, 1.5), (leg + rng.uniform(-0.2, 0.2), 3.3))
        brush.ellipse(fur, (2.2, 1.15), (1.75, 0.95))
    else:
        brush.line(dark, tail, (3.3, 1.4), (4.1, 1.2 + 0.5 * curl), (4.5, 0.7 + curl))
        brush.ellipse(fur, (1.9, 1.05), (1.9, 0.85), 0.08)
        for leg in (-0.3, 0.5):
            brush.line(dark, 0.4, (leg + 0.8, 1.4), (leg - 0.4, 1.65))
    middle, length = {"portrait": ((0, 2.0), 0.9), "sitting": ((0, 2.0), 0.8)}.get(pose, ((2.1, 1.05), 1.4))
    for _ in range(0 if pattern == "plain" else rng.integers(2, 6)):
        x, y = middle[0] + rng.uniform(-length, length), middle[1] + rng.uniform(-0.4, 0.5)
        if pattern == "stripes":
            brush.line(second, 0.1, (x - 0.08, y - 0.4), (x + 0.05, y), (x - 0.05, y + 0.35))
        else:
            brush.ellipse(second, (x, y), (rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.35)))


def _head(brush: Brush, kind: str, fur: Colour, second: Colour, pattern: str, rng: np.random.Generator) -> None:
    is_cat = kind == "cat"
    dark = shade(fur, 0.8)
    wide = rng.uniform(0.95, 1.15) if is_cat else rng.uniform(0.82, 1.05)
    _ears(brush, is_cat, wide, dark, second, rng)
    brush.ellipse(fur, (0, 0), (wide, rng.uniform(0.82, 0.95) if is_cat else rng.uniform(0.92, 1.1)))
    if pattern == "stripes":
        for x in (-0.25, 0.0, 0.25):
            brush.line(second, 0.08, (x, -0.82), (x * 0.8, -0.45))
    elif pattern == "patches":
        brush.ellipse(second, (rng.choice([-0.4, 0.4]), -0.2), (0.38, 0.45), rng.uniform(-0.4, 0.4))
    _eyes(brush, is_cat, dark, rng)
    pale = shade(fur, rng.uniform(1.15, 1.5))
    if is_cat:
        _cat_face(brush, pale, rng)
    else:
        _dog_face(brush, pale, rng)


def _ears(brush: Brush, is_cat: bool, wide: float, dark: Colour, second: Colour, rng: np.random.Generator) -> None:
    pointed = rng.random() < (0.88 if is_cat else 0.3)
    tall, spread = rng.uniform(1.35, 1.65), rng.uniform(0.62, 0.9)
    outer = second if rng.random() < 0.3 else dark
    for side in (-1, 1):
        if pointed:
            tip = (side * spread, -tall if is_cat else -tall - 0.1)
            brush.polygon(outer, (side * wide * 0.95, -0.3), tip, (side * 0.18, -0.75))
            inner = ((side * wide * 0.8, -0.5), (tip[0] * 0.97, tip[1] + 0.25), (side * 0.36, -0.75))
            brush.polygon((214, 150, 150), *inner)
        elif is_cat:  # folded
            brush.polygon(outer, (side * wide * 0.95, -0.4), (side * 0.75, -0.98), (side * 0.25, -0.78))
            brush.polygon(shade(outer, 0.85), (side * 0.85, -0.6), (side * 0.62, -0.55), (side * 0.6, -0.92))
        else:
            hang = rng.uniform(0.15, 0.5)
            brush.ellipse(
                outer, (side * (wide + 0.02), hang), (0.3, rng.uniform(0.65, 0.95)), -side * rng.uniform(0.1, 0.5)
            )


def _eyes(brush: Brush, is_cat: bool, dark: Colour, rng: np.random.Generator) -> None:
    black, iris = (20, 18, 18), vary_colour(rng.choice(EYES), rng, 10)
    closed = rng.random() < 0.1
    for side in (-1, 1):
        x, y = side * 0.4, -0.12
        if closed:
            brush.line(black, 0.06, (x - 0.18, y), (x, y + 0.08), (x + 0.18, y))
        elif is_cat:
            brush.ellipse(black, (x, y), (0.25, 0.2), side * -0.25)
            brush.ellipse(iris, (x, y), (0.21, 0.165), side * -0.25)
            brush.ellipse(black, (x, y), (rng.uniform(0.035, 0.12), 0.16))
        else:
            brush.ellipse(shade(dark, 0.8), (x, y), (0.2, 0.18))
            brush.ellipse(black if rng.random() < 0.7 else iris, (x, y), (0.15, 0.15))
            brush.ellipse(black, (x, y), (0.09, 0.09))
        if not closed:
            brush.ellipse((245, 245, 245), (x + 0.05, y - 0.06), (0.035, 0.035))


def _cat_face(brush: Brush, pale: Colour, rng: np.random.Generator) -> None:
    for side in (-1, 1):
        brush.ellipse(pale, (side * 0.17, 0.42), (0.24, 0.19))
    brush.polygon((205, 120, 125), (-0.11, 0.2), (0.11, 0.2), (0, 0.33))
    for side in (-1, 1):
        brush.line((70, 50, 50), 0.035, (0, 0.33), (side * 0.06, 0.46), (side * 0.2, 0.48))
    if rng.random() < 0.85:
        hair = (240, 240, 235) if sum(pale) < 560 else (90, 85, 80)
        for side in (-1, 1):
            for slope in (-0.18, 0.02, 0.2):
                end = (side * rng.uniform(1.15, 1.45), 0.4 + slope + rng.uniform(-0.06, 0.06))
                brush.line(hair, 0.025, (side * 0.3, 0.4 + slope * 0.3), end)


def _dog_face(brush: Brush, pale: Colour, rng: np.random.Generator) -> None:
    black, drop = (28, 24, 24), rng.uniform(0.5, 0.68)
    if rng.random() < 0.45:
        brush.ellipse((222, 110, 120), (rng.uniform(-0.1, 0.1), drop + 0.5), (0.17, 0.34))
    brush.ellipse(pale, (0, drop), (rng.uniform(0.42, 0.56), rng.uniform(0.42, 0.5)))
    brush.ellipse(black, (0, drop - 0.25), (rng.uniform(0.19, 0.26), 0.16))
    brush.ellipse((120, 115, 115), (-0.06, drop - 0.31), (0.06, 0.03))
    brush.line(black, 0.045, (0, drop - 0.1), (0, drop + 0.14))
    for side in (-1, 1):
        brush.line(black, 0.045, (0, drop + 0.14), (side * 0.16, drop + 0.24), (side * 0.32, drop + 0.16))


def _background(animal: str, rng: np.random.Generator) -> Image.Image:
    """A wall and floor, a meadow, a carpet or a plain gradient."""
    top, bottom = (np.array(vary_colour(colour, rng, 30), float) for colour in rng.choice(FURS + OBJECTS, 2))
    mix = np.linspace(0, 1, CANVAS)[:, None, None]
    rows = (top * (1 - mix) + bottom * mix).astype(np.uint8)
    image = Image.fromarray(rows.repeat(CANVAS, axis=1))
    draw = ImageDraw.Draw(image)
    kind, horizon = rng.choice(list(SETTINGS), p=SETTING_PROBABILITIES[animal]), int(CANVAS * rng.uniform(0.45, 0.75))
    if kind == "room":
        draw.rectangle((0, horizon, CANVAS, CANVAS), fill=vary_colour(rng.choice(FURS), rng, 25))
        draw.line((0, horizon, CANVAS, horizon), fill=(225, 220, 210), width=int(rng.integers(2, 8)))
    elif kind == "meadow":
        green = np.array([70, 125, 50]) + rng.integers(-30, 30, 3)
        draw.rectangle((0, horizon, CANVAS, CANVAS), fill=tuple(green.tolist()))
        for x, y, lean, light in rng.uniform((0, horizon, -8, 0.7), (CANVAS, CANVAS, 8, 1.3), (120, 4)):
            draw.line((x, y, x + lean, y - 14), fill=shade(tuple(green.tolist()), light), width=2)
    elif kind == "carpet":
        step, stripe = int(rng.integers(14, 40)), vary_colour(rng.choice(OBJECTS), rng, 30)
        slant = int(rng.integers(-120, 120))
        for x in range(-CANVAS, 2 * CANVAS, 2 * step):
            draw.line((x, 0, x + slant, CANVAS), fill=stripe, width=step)
    return image


def _draw_object(draw: ImageDraw.ImageDraw, rng: np.random.Generator, low: float = 0.05, high: float = 0.2) -> None:
    """A ball, a box, a cushion or a plant; sizes as fractions of the canvas."""
    x, y = rng.uniform(0, CANVAS, 2)
    size, colour = CANVAS * rng.uniform(low, high), vary_colour(rng.choice(OBJECTS), rng, 25)
    kind = rng.choice(["ball", "box", "cushion", "plant"])
    box = (x - size, y - size, x + size, y + size)
    if kind == "ball":
        draw.ellipse(box, fill=colour)
        draw.arc(box, int(rng.integers(360)), int(rng.integers(360)), fill=shade(colour, 0.7), width=3)
    elif kind == "box":
        draw.rectangle((x - size, y - size * rng.uniform(0.3, 1), x + size, y + size), fill=colour)
    elif kind == "cushion":
        draw.rounded_rectangle((x - size, y - size * 0.6, x + size, y + size * 0.6), size / 3, fill=colour)
    else:
        for angle in rng.uniform(0, 2 * np.pi, 7):
            tip = (x + 1.4 * size * np.cos(angle), y + 1.4 * size * np.sin(angle))
            beside = (x + 0.3 * size * np.cos(angle + 1.2), y + 0.3 * size * np.sin(angle + 1.2))
            draw.polygon(((x, y), beside, tip), fill=shade((60, 130, 70), rng.uniform(0.7, 1.2)))


def _photograph(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The light, the lens and the sensor: brightness falling off to one side, a cast, blur, noise."""
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3)))
    ramp, angle = np.linspace(-1, 1, SIZE, dtype=np.float32), rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 0.25) * np.array([np.cos(angle), np.sin(angle)], np.float32)
    light = np.float32(rng.uniform(0.75, 1.15)) + slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    pixels = np.asarray(image) * (light[..., None] * rng.uniform(0.9, 1.1, 3).astype(np.float32))
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 11))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
