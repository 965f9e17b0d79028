# SPDX-License-Identifier: Apache-2.0
"""What stands in a synthetic street, drawn from far to near."""

from typing import Any

import numpy as np

from jaxprune.data import street
from jaxprune.data.street import (
    BICYCLIST,
    BUILDING,
    CAR,
    FENCE,
    PAVEMENT,
    PEDESTRIAN,
    POLE,
    ROAD,
    SIGN,
    TREE,
    UNLABELLED,
    Canvas,
)

_FAR = 75.0  # metres; where the street ends
_WALLS = (
    (150, 100, 80),
    (175, 160, 135),
    (120, 115, 110),
    (200, 190, 175),
    (135, 85, 65),
)
_PAINTS = ((160, 30, 30), (30, 50, 120), (190, 190, 195), (40, 40, 45), (230, 230, 230))
_LEAVES = ((60, 90, 35), (80, 105, 45), (45, 78, 38), (92, 104, 52))


def draw(canvas: Canvas) -> None:
    """Draw the whole street, farthest first."""
    _ground(canvas)
    _end(canvas)
    for z, thing, side in sorted(_plan(canvas), key=lambda item: -item[0]):
        thing(canvas, side, z)


def _plan(canvas: Canvas) -> list:
    rng, green = canvas.rng, canvas.street.green
    plan: list = []
    for side in (0, 1):
        z = rng.uniform(1.5, 6)
        while z < _FAR:
            z += rng.uniform(6, 17)
            plan.append((z, _lot(rng, green), side))
        counts = rng.poisson((1.6, 0.55, 0.9, 0.6, 0.85, 0.22, 1.1))
        kinds = (_parked, _pole, _sign, _street_tree, _pedestrian, _bicyclist, _bin)
        for count, kind in zip(counts, kinds, strict=True):
            near = 5 if kind in (_pedestrian, _bicyclist) else 6
            for z in near + rng.exponential(9, count):
                plan.append((z, kind, side))
        if rng.random() < 0.5:
            plan.append((rng.uniform(9, 40), _driving, side))
    return plan


def _lot(rng: np.random.Generator, green: float) -> Any:
    shares = np.array([1.0 - green, 0.5 * green, 0.4 * green + 0.18, 0.25])
    return (_house, _garden, _fenced, _opening)[rng.choice(4, p=shares / shares.sum())]


def _ground(canvas: Canvas) -> None:
    rng, near = canvas.rng, 0.3
    grey = rng.uniform(85, 120)
    pave = grey + rng.uniform(10, 45)
    for edges, color, kind in (
        ((-60, 60), (pave, pave * 0.97, pave * 0.93), PAVEMENT),
        (canvas.street.kerbs, (grey, grey, grey * 1.03), ROAD),
    ):
        strip = [(edges[0], near), (edges[1], near), (edges[1], _FAR), (edges[0], _FAR)]
        street.polygon(canvas, [(x, 0, z) for x, z in strip], color, kind)


def _end(canvas: Canvas) -> None:
    """What closes the street: houses and trees side by side, far away."""
    rng, x = canvas.rng, -60.0
    while x < 60:
        width, tall = rng.uniform(5, 18), rng.uniform(5, 12)
        if rng.random() < 0.35 + 0.5 * canvas.street.green:
            color = 0.7 * street.vary(rng, _LEAVES) + 40
            for k in np.arange(0, width, 2.5):
                street.disc(canvas, x + k, rng.uniform(1, 4), _FAR, 3.2, color, TREE)
        else:
            color = 0.7 * street.vary(rng, _WALLS) + 45
            street.upright(canvas, x, 0, _FAR, width, tall, color, BUILDING)
        x += width


def _house(canvas: Canvas, side: int, z: float) -> None:
    rng, sign = canvas.rng, 2 * side - 1
    x, tall = canvas.street.fronts[side], rng.uniform(4, 9)
    length, color = rng.uniform(6, 17), street.vary(rng, _WALLS)
    start = max(z - length, 0.4)
    side_wall = min(x, x + 12 * sign)
    street.upright(canvas, side_wall, 0, start, 12, tall, 0.8 * color, BUILDING)
    if rng.random() < 0.5:
        ridge, roof = tall + rng.uniform(1.5, 3), 0.5 * color + 15
        middle, back = x + 3 * sign, x + 6 * sign
        gable = [(x, tall, start), (middle, ridge, start), (back, tall, start)]
        street.polygon(canvas, gable, 0.8 * color, BUILDING)
        sheet = [(x, tall, start), (x, tall, z), (middle, ridge, z)]
        street.polygon(canvas, [*sheet, (middle, ridge, start)], roof, BUILDING)
    street.wall(canvas, x, z, length, tall, color, BUILDING)
    if rng.random() < 0.4:  # a shop sign above the window
        board = [(x, y, start + t) for y, t in ((2.6, 1), (3.2, 1), (3.2, 4), (2.6, 4))]
        street.polygon(canvas, board, street.vary(rng, _PAINTS, 30), SIGN)


def _garden(canvas: Canvas, side: int, z: float) -> None:
    rng, sign = canvas.rng, 2 * side - 1
    hedge = street.vary(rng, _LEAVES, 8)
    front = canvas.street.fronts[side]
    street.wall(canvas, front, z, 14, rng.uniform(0.8, 2), 0.8 * hedge, TREE)
    for back in np.sort(rng.uniform(0, 10, rng.integers(2, 4)))[::-1]:
        _crown(canvas, front + sign * rng.uniform(1, 5), z - 10 + back)


def _fenced(canvas: Canvas, side: int, z: float) -> None:
    rng = canvas.rng
    if rng.random() < 0.7:
        _garden(canvas, side, z)
    color = street.vary(rng, ((120, 95, 70), (90, 95, 100), (60, 65, 60)), 10)
    tall = rng.uniform(0.9, 1.7)
    street.wall(
        canvas, canvas.street.fronts[side], z, rng.uniform(7, 14), tall, color, FENCE
    )


def _opening(canvas: Canvas, side: int, z: float) -> None:
    """A yard or a side street with rubble, none of which has a class."""
    rng, x = canvas.rng, canvas.street.fronts[side]
    far = x + 25 * (2 * side - 1)
    color = street.vary(rng, ((130, 120, 100), (110, 112, 108)), 12)
    yard = [(x, 0, z - 9), (far, 0, z - 9), (far, 0, z), (x, 0, z)]
    street.polygon(canvas, yard, color, UNLABELLED)
    tall = rng.uniform(1, 3.5)
    street.upright(canvas, min(x, far), 0, z, 25, tall, 0.8 * color, UNLABELLED)


def _crown(canvas: Canvas, x: float, z: float) -> None:
    """A tree's trunk and leaves."""
    rng, z = canvas.rng, max(z, 2.5)
    tall, leaf = rng.uniform(2.5, 5), street.vary(rng, _LEAVES, 10)
    street.upright(canvas, x - 0.15, 0, z, 0.3, tall, (75, 62, 50), TREE)
    radii, shades = rng.uniform(0.6, 1.3, 6), rng.uniform(0.7, 1.25, 6)
    for (dx, dy), r, shade in zip(
        rng.normal(0, 0.8, (6, 2)), radii, shades, strict=True
    ):
        street.disc(canvas, x + dx, tall + dy, z, r, shade * leaf, TREE)


def _street_tree(canvas: Canvas, side: int, z: float) -> None:
    _crown(canvas, _on_pavement(canvas, side, 0.7), z)


def _on_pavement(canvas: Canvas, side: int, part: float) -> float:
    """An x on the pavement, `part` of the way from the kerb to the house front."""
    kerb, front = canvas.street.kerbs[side], canvas.street.fronts[side]
    return kerb + part * (front - kerb)


def _pole(canvas: Canvas, side: int, z: float) -> None:
    rng, x = canvas.rng, _on_pavement(canvas, side, 0.15)
    tall, grey = rng.uniform(3, 7.5), rng.uniform(50, 130)
    wide = max(rng.uniform(0.12, 0.2), 2 * z / canvas.street.focal)
    street.upright(canvas, x, 0, z, wide, tall, (grey, grey, grey), POLE)
    if tall > 5:
        reach = x if side == 0 else x - 1.5
        street.upright(canvas, reach, tall, z, 1.5, 0.15, (grey, grey, grey), POLE)


def _sign(canvas: Canvas, side: int, z: float) -> None:
    rng, x = canvas.rng, _on_pavement(canvas, side, 0.25)
    foot, size = rng.uniform(1.7, 2.6), rng.uniform(0.5, 1.1)
    wide = max(0.1, 2 * z / canvas.street.focal)
    street.upright(canvas, x - wide / 2, 0, z, wide, foot, (95, 95, 95), POLE)
    color = street.vary(
        rng, ((200, 30, 30), (30, 60, 170), (225, 190, 40), (30, 110, 60)), 12
    )
    if rng.random() < 0.5:
        street.disc(canvas, x, foot + size / 2, z, size / 2, color, SIGN)
        street.disc(canvas, x, foot + size / 2, z, size / 3, (225, 225, 225), SIGN)
    else:
        tall = size * rng.uniform(0.8, 1.8)
        street.upright(canvas, x - size / 2, foot, z, size, tall, color, SIGN)


def _bin(canvas: Canvas, side: int, z: float) -> None:
    rng = canvas.rng
    x, wide, tall = _on_pavement(canvas, side, 0.4), *rng.uniform(0.5, 1.6, 2)
    color = street.vary(
        rng, ((40, 80, 50), (90, 90, 95), (120, 85, 60), (150, 140, 60)), 15
    )
    street.upright(canvas, x - wide / 2, 0, z, wide, tall, color, UNLABELLED)


def _parked(canvas: Canvas, side: int, z: float) -> None:
    x = canvas.street.kerbs[side] - (2 * side - 1) * 0.75
    _car(canvas, x, z)


def _driving(canvas: Canvas, side: int, z: float) -> None:
    _car(canvas, 0.4 * canvas.street.kerbs[side], z)


def _car(canvas: Canvas, x: float, z: float) -> None:
    rng = canvas.rng
    w, tall, color = 1.7, rng.uniform(1.3, 1.9), street.vary(rng, _PAINTS, 18)
    left, waist, back, glass = x - w / 2, 0.55 * tall, z + 3.8, (35, 42, 50)
    shadow = [(left - 0.2, 0, z), (left + w + 0.2, 0, z), (left + w + 0.2, 0, back)]
    street.polygon(canvas, [*shadow, (left - 0.2, 0, back)], (45, 45, 48), None)
    flank = left if x > 0 else left + w  # the side that the camera sees
    body = [(flank, 0.25, z), (flank, waist, z), (flank, waist, back)]
    street.polygon(canvas, [*body, (flank, 0.25, back)], 0.8 * color, CAR)
    inner = flank + (0.15 if x > 0 else -0.15)
    cabin = [(flank, waist, z + 0.2), (inner, tall, z + 0.6), (inner, tall, back - 1.5)]
    street.polygon(canvas, [*cabin, (flank, waist, back - 0.7)], glass, CAR)
    for at in (z + 0.8, back - 0.8):
        street.disc(canvas, flank, 0.3, at, 0.3, (25, 25, 27), CAR)
    for wheel in (left + 0.05, left + w - 0.3):
        street.upright(canvas, wheel, 0, z, 0.25, 0.35, (22, 22, 24), CAR)
    street.upright(canvas, left, 0.22, z, w, waist - 0.22, color, CAR)
    waistline = [(left + 0.05, waist, z), (left + w - 0.05, waist, z)]
    roof = [(left + w - 0.25, tall, z), (left + 0.25, tall, z)]
    street.polygon(canvas, [*waistline, *roof], 0.9 * color, CAR)
    street.upright(
        canvas, left + 0.3, waist + 0.08, z, w - 0.6, 0.7 * waist, glass, CAR
    )
    lamp = (190, 35, 30) if rng.random() < 0.6 else (235, 230, 200)
    for lamp_x in (left + 0.08, left + w - 0.33):
        street.upright(canvas, lamp_x, 0.7 * waist, z, 0.25, 0.15, lamp, CAR)
    street.upright(canvas, x - 0.25, 0.4, z, 0.5, 0.12, (220, 215, 150), CAR)


def _person(canvas: Canvas, x: float, z: float, foot: float, tall: float, kind) -> None:
    rng = canvas.rng
    coat = street.vary(rng, (*_PAINTS, (120, 90, 60)), 25)
    trousers = street.vary(rng, ((40, 45, 70), (35, 35, 38), (90, 80, 65)), 12)
    stride = rng.uniform(0.02, 0.18)
    for leg in (-stride, stride):
        legs = [(x + leg - 0.09, foot, z), (x + leg + 0.09, foot, z)]
        hip = foot + 0.5 * tall
        street.polygon(
            canvas, [*legs, (x + 0.1, hip, z), (x - 0.1, hip, z)], trousers, kind
        )
    torso = foot + 0.47 * tall
    street.upright(canvas, x - 0.23, torso, z, 0.46, 0.36 * tall, coat, kind)
    skin = street.vary(rng, ((205, 165, 140), (150, 110, 85), (95, 65, 50)), 8)
    street.disc(canvas, x, foot + 0.91 * tall, z, 0.13, skin, kind)


def _pedestrian(canvas: Canvas, side: int, z: float) -> None:
    x = _on_pavement(canvas, side, canvas.rng.uniform(0.1, 0.9))
    _person(canvas, x, z, 0, canvas.rng.uniform(1.5, 1.9), PEDESTRIAN)


def _bicyclist(canvas: Canvas, side: int, z: float) -> None:
    rng = canvas.rng
    x = canvas.street.kerbs[side] * rng.uniform(0.4, 0.8)
    z, apart = max(z, 7), rng.uniform(0.1, 0.5)
    for dx in (-apart, apart):
        street.disc(canvas, x + dx, 0.34, z, 0.34, (30, 30, 32), BICYCLIST)
    street.upright(canvas, x - apart, 0.5, z, 2 * apart, 0.12, (150, 40, 40), BICYCLIST)
    _person(canvas, x, z, 0.45, 1.45, BICYCLIST)
