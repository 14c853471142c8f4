"""Shapes and colours of the synthetic images."""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass
class Brush:
    """Draws shapes given in the animal's own coordinates: origin in the middle of the head, 1 its radius, y down."""

    draw: ImageDraw.ImageDraw
    centre: Point  # on the canvas, pixels
    size: float  # pixels of one unit
    angle: float  # radians
    mirrored: bool

    def place(self, points: np.ndarray) -> list[Point]:
        """[P, 2] in the animal's coordinates as pixels on the canvas."""
        x, y = (points * (-1 if self.mirrored else 1, 1)).T
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x_rotated, y_rotated = x * cos - y * sin, x * sin + y * cos
        return list(zip(self.centre[0] + self.size * x_rotated, self.centre[1] + self.size * y_rotated, strict=True))

    def polygon(self, colour: Colour, *points: Point) -> None:
        """A filled polygon."""
        self.draw.polygon(self.place(np.array(points, float)), fill=colour)

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        """A line; `width` in the animal's units."""
        pixels = max(1, round(width * self.size))
        self.draw.line(self.place(np.array(points, float)), fill=colour, width=pixels, joint="curve")

    def ellipse(self, colour: Colour, centre: Point, radii: Point, angle: float = 0.0) -> None:
        """A filled ellipse, rotated by `angle` radians."""
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        x, y = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
        cos, sin = np.cos(angle), np.sin(angle)
        points = np.stack([centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos], axis=1)
        self.draw.polygon(self.place(points), fill=colour)


def vary_colour(name: str, rng: np.random.Generator, spread: int) -> Colour:
    """The colour called "#rrggbb", each channel moved by up to `spread`."""
    channels = np.array([int(name[start : start + 2], 16) for start in (1, 3, 5)]) + rng.integers(
        -spread, spread + 1, 3
    )
    return tuple(channels.clip(0, 255).tolist())


def shade(colour: Colour, factor: float) -> Colour:
    """A darker or lighter colour: each channel times `factor`."""
    red, green, blue = (int(min(255, channel * factor)) for channel in colour)
    return red, green, blue
