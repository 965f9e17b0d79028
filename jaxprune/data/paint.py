# SPDX-License-Identifier: Apache-2.0
"""Surface, light and camera of a synthetic street: from flat colours to a picture.

Arrays are [H, W] over the pixels, float32. Walls along the street and the ground are
planes, so each pixel's place on them, in metres, follows from the camera alone.
"""

from typing import Any

import numpy as np

from jaxprune.data import street as streets
from jaxprune.data.street import Street

# How strongly each class is textured: by pixels, and by patches.
_FINE = np.array([0.5, 5, 4, 6, 6, 12, 3, 5, 3, 5, 5, 7], np.float32)
_COARSE = np.array([2, 7, 4, 4, 5, 20, 4, 5, 5, 5, 5, 9], np.float32)


def paint(
    rng: np.random.Generator, street: Street, flat: np.ndarray, label: np.ndarray
) -> np.ndarray:
    """uint8[H, W, 3] from flat colours uint8[H, W, 3] and uint8[H, W] classes."""
    down = np.arange(street.height, dtype=np.float32)[:, None] - street.horizon + 0.5
    right = np.arange(street.width, dtype=np.float32)[None, :] - street.center + 0.5
    light = _texture(rng, label)
    light += _walls(rng, street, label, down, right)
    light += _ground(rng, street, label, down, right)
    picture = flat.astype(np.float32) + light[..., None]
    _sky(rng, street, picture, label)
    return _expose(rng, street, picture)


def _texture(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    fine = rng.standard_normal(label.shape, np.float32)
    patches = _smooth(rng, label.shape, 6)
    return _FINE[label] * fine + _COARSE[label] * patches


def _smooth(rng: np.random.Generator, shape: tuple, cell: int) -> np.ndarray:
    """Noise of deviation about 1 whose grain is `cell` pixels."""
    from PIL import Image

    small = tuple(n // cell + 2 for n in shape)
    noise = Image.fromarray(rng.standard_normal(small, np.float32))
    return 1.4 * np.asarray(noise.resize(shape[::-1], Image.Resampling.BILINEAR))


def _walls(
    rng: np.random.Generator, street: Street, label: np.ndarray, down: Any, right: Any
) -> np.ndarray:
    """Windows of the houses and bars of the fences."""
    pitch, sill = rng.uniform(2, 3.8, 2), rng.uniform(0.3, 0.45)
    glass = rng.uniform(-65, -25) if rng.random() < 0.8 else 40.0
    on_left = right < 0
    front = np.where(on_left, -street.fronts[0], street.fronts[1]).astype(np.float32)
    z = street.focal * front / np.maximum(np.abs(right), 1)  # [1, W]
    y = street.eye - down * (z / street.focal)  # [H, W]
    column = (z / np.where(on_left, pitch[0], pitch[1]).astype(np.float32)) % 1
    floor = (y / np.float32(2.9)) % 1
    window = (column > 0.3) & (column < 0.75) & (floor > sill) & (floor < 0.85)
    sharp = np.clip(1.3 - z / 60, 0, 1)  # far windows run together
    house = window & (y > 0) & (label == streets.BUILDING)
    bars = ((z * 3) % 1 < 0.35) & (label == streets.FENCE) & (z < 25)
    return np.where(house, glass * sharp, 0) - np.where(bars, np.float32(35), 0)


def _ground(
    rng: np.random.Generator, street: Street, label: np.ndarray, down: Any, right: Any
) -> np.ndarray:
    """Lane markings, kerbs, slabs of the pavement, and the shadow of one side."""
    top = max(int(street.horizon) + 1, 0)
    z = street.focal * street.eye / np.maximum(down[top:], 0.5)
    x = right * (z / street.focal)
    left_kerb, right_kerb = street.kerbs
    middle, phase = rng.uniform(-0.4, 0.4), rng.random()
    dashed = (np.abs(x - middle) < 0.08) & ((z / 5 + phase) % 1 < 0.45)
    lines = dashed
    if rng.random() < 0.4:
        edge = np.minimum(np.abs(x - left_kerb - 0.3), np.abs(x - right_kerb + 0.3))
        lines = dashed | (edge < 0.06)
    kerb = np.minimum(np.abs(x - left_kerb + 0.1), np.abs(x - right_kerb - 0.1)) < 0.1
    slabs = ((x % 0.7) < 0.06) | ((z % 0.7) < 0.06)
    shade = np.zeros_like(x)
    if rng.random() < 0.5:
        border = rng.uniform(left_kerb, right_kerb)
        border = border + 0.3 * np.sin(z * rng.uniform(0.3, 1))
        shade = -28 * ((x < border) if rng.random() < 0.5 else (x > border))
    road, pave = label[top:] == streets.ROAD, label[top:] == streets.PAVEMENT
    light = np.zeros(label.shape, np.float32)
    light[top:] = road * (shade + np.where(lines & (z < 40), 85, 0))
    light[top:] += pave * (
        shade + np.where(kerb, 30, 0) - np.where(slabs & (z < 9), 18, 0)
    )
    return light


def _sky(
    rng: np.random.Generator, street: Street, picture: np.ndarray, label: np.ndarray
) -> None:
    """Fill the sky in place: a gradient from blue or grey to pale, with clouds."""
    overcast = rng.random()
    zenith = (1 - overcast) * np.array([95, 140, 200]) + overcast * np.array([165] * 3)
    pale = np.array([205, 212, 218]) + rng.normal(0, 10, 3)
    rows = min(max(int(street.horizon) + 2, 1), street.height)
    height = np.clip(np.arange(rows) / max(street.horizon, 1), 0, 1)
    gradient = zenith + height[:, None] * (pale - zenith)  # [rows, 3]
    clouds = np.clip(_smooth(rng, (rows, street.width), 24), 0, None)
    clouds = clouds * np.float32(rng.uniform(0, 30))
    sky = gradient[:, None].astype(np.float32) + clouds[..., None]
    np.copyto(picture[:rows], sky, where=(label[:rows] == streets.SKY)[..., None])


def _expose(
    rng: np.random.Generator, street: Street, picture: np.ndarray
) -> np.ndarray:
    """Light and camera: exposure, tint, uneven light, gamma."""
    gain = np.exp(rng.normal(0, 0.16))
    tint = gain * (1 + rng.normal(0, 0.03, 3))
    uneven = 1 + 0.06 * _smooth(rng, picture.shape[:2], max(street.width // 3, 1))
    picture *= uneven[..., None]
    picture *= tint.astype(np.float32)
    np.clip(picture, 0, 255, out=picture)
    curve = 255 * (np.arange(256) / 255) ** np.exp(rng.normal(0, 0.1))
    return np.rint(curve).astype(np.uint8)[picture.astype(np.uint8)]
