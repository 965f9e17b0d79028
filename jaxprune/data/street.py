# SPDX-License-Identifier: Apache-2.0
"""A synthetic street's layout, and how shapes in it are drawn.

Everything is placed in metres (x to the right, y up, z ahead) and seen by a camera in a
car. Each shape is drawn twice: its colour into the picture, its class into the labels.
"""

from typing import Any, NamedTuple

import numpy as np

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE = range(6)
SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST, UNLABELLED = range(6, 12)


class Street(NamedTuple):
    """The camera (pixels, metres) and the lines along the street (metres)."""

    height: int
    width: int
    focal: float
    center: float  # column of the vanishing point
    horizon: float  # row of the horizon
    eye: float  # metres above the road
    kerbs: tuple[float, float]  # x of the road's edges
    fronts: tuple[float, float]  # x of the house fronts
    green: float  # share of the lots that are gardens


class Canvas(NamedTuple):
    """The two pictures that are drawn together, and the randomness."""

    image: Any
    label: Any
    street: Street
    rng: np.random.Generator


def lay_out(rng: np.random.Generator, height: int, width: int, shift: float) -> Street:
    """A random street; `shift` moves the distributions (0 = those of training)."""
    kerbs = (-rng.uniform(1.9, 3.6) - shift, rng.uniform(1.9, 3.6) + shift)
    fronts = kerbs[0] - rng.uniform(0.7, 2.2), kerbs[1] + rng.uniform(0.7, 2.2)
    return Street(
        height=height,
        width=width,
        focal=width * rng.uniform(0.75, 1.0 + 0.2 * shift),
        center=width * (0.5 + rng.uniform(-0.14, 0.14)),
        horizon=height * rng.uniform(0.40, 0.52 + 0.05 * shift),
        eye=rng.uniform(1.3, 1.7),
        kerbs=kerbs,
        fronts=fronts,
        green=rng.uniform(0.05, 0.55),
    )


def _point(street: Street, x: float, y: float, z: float) -> tuple[float, float]:
    """Column and row at which a point in metres appears."""
    scale = street.focal / max(z, 0.3)
    return street.center + x * scale, street.horizon + (street.eye - y) * scale


def polygon(canvas: Canvas, points: list, color: Any, kind: int | None) -> None:
    """Fill the polygon of points (x, y, z); `kind` None leaves the labels alone."""
    flat = [_point(canvas.street, *point) for point in points]
    canvas.image.polygon(flat, fill=_rgb(color))
    if kind is not None:
        canvas.label.polygon(flat, fill=kind)


def upright(
    canvas: Canvas, x: float, y: float, z: float, w: float, h: float, color, kind
) -> None:
    """A rectangle that faces the camera, from (x, y), `w` wide and `h` high."""
    corners = [(x, y, z), (x + w, y, z), (x + w, y + h, z), (x, y + h, z)]
    polygon(canvas, corners, color, kind)


def disc(canvas: Canvas, x: float, y: float, z: float, r: float, color, kind) -> None:
    """A disc of radius `r` metres, at least a pixel, that faces the camera."""
    u, v = _point(canvas.street, x, y, z)
    r = max(r * canvas.street.focal / z, 1.0)
    canvas.image.ellipse((u - r, v - r, u + r, v + r), fill=_rgb(color))
    if kind is not None:
        canvas.label.ellipse((u - r, v - r, u + r, v + r), fill=kind)


def wall(
    canvas: Canvas, x: float, z: float, length: float, tall: float, color, kind
) -> None:
    """A wall along the street that ends at `z`."""
    start = max(z - length, 0.4)
    corners = [(x, 0, start), (x, tall, start), (x, tall, z), (x, 0, z)]
    polygon(canvas, corners, color, kind)


def vary(rng: np.random.Generator, colors: tuple, spread: float = 15) -> np.ndarray:
    """One of the colours, a little lighter or darker and a little tinted."""
    drawn = rng.normal(0, spread, 4)
    return np.array(colors[rng.integers(len(colors))]) + drawn[0] + 0.4 * drawn[1:]


def _rgb(color: Any) -> tuple[int, int, int]:
    r, g, b = color
    return int(min(max(r, 0), 255)), int(min(max(g, 0), 255)), int(min(max(b, 0), 255))
