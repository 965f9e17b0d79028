# SPDX-License-Identifier: Apache-2.0
"""What a network sees in images: labels, and overlays of any files one points at."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import base, report
from jaxprune.data import images as image_files
from jaxprune.pruned import check_room, image_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
Size = tuple[int, int]


def predict(
    pruned: Any,
    images: Iterable[np.ndarray],
    *,
    size: Size | Literal["native"] | None = None,
    batch: int = 4,
) -> Iterator[np.ndarray]:
    """The most likely class of every pixel, image by image.

    pruned: what `jaxprune.load` returns. images: uint8[H, W, 3] each, of any sizes.
    size: (H, W) that the network runs at: by default the one it was trained at (the
    logits are scaled back up), 'native' for each image's own. batch: images a call.
    Yields uint8[H, W], in the images' own sizes and order. Raises ConfigError where
    no size is given and the network's file names none.
    """
    run = _compiled(pruned)
    for some, inputs in _inputs(pruned, images, size, batch):
        logits = np.asarray(run(pruned.variables, inputs))
        for image, scores in zip(some, logits, strict=False):
            yield _labels(scores, image.shape[:2])


def sample(
    pruned: Any,
    images: Iterable[np.ndarray],
    *,
    samples: int = 40,
    seed: int = 0,
    size: Size | Literal["native"] | None = None,
    batch: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `predict`, by Monte-Carlo dropout: the classes, and how uncertain they are.

    The network's apply takes `sample=True` (SegNet's and FCN's do), by which dropout
    stays on; the class probabilities of so many samples are averaged (Kendall et al.,
    "Bayesian SegNet", 2017). Yields (uint8[H, W], float32[H, W]): the most likely
    class, and the variance of the probabilities over the samples, averaged over the
    classes. Raises ConfigError for a shipped network that has no dropout.
    """
    _check_dropout(pruned)
    run, key = _sampler(pruned, samples), jax.random.key(seed)
    for some, inputs in _inputs(pruned, images, size, batch):
        key, own = jax.random.split(key)
        found = map(np.asarray, run(pruned.variables, inputs, own))
        for image, mean, variance in zip(some, *found, strict=False):
            shape = image.shape[:2]
            yield _labels(mean, shape), _plane(variance.mean(-1), shape)


def find(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` name: image files, folders of images, glob patterns.

    Sorted within each input, each file once. Raises DataError, naming it, for an input
    that does not exist, a folder without images, or a pattern that matches no file.
    """
    found: dict[Path, None] = {}
    for entry in inputs:
        found.update(dict.fromkeys(_expand(entry)))
    return list(found)


def read_image(file: Path, data: bytes | None = None) -> np.ndarray:
    """An image file as uint8[H, W, 3], upright; transparency is shown on white.

    data: what it holds, where `file` is only its name.

    Grey, palette, 16-bit and CMYK files become RGB. Raises DataError, naming the file,
    where it is damaged or no image.
    """
    from PIL import Image

    image = image_files.decode(file, data)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    return np.asarray(image_files.opaque(image))


def write(
    pruned: Any,
    files: Sequence[Path],
    out: Path,
    *,
    size: Size | Literal["native"] | None = None,
    batch: int = 4,
    opacity: float = 0.5,
    labels: bool = False,
    samples: int = 0,
) -> Iterator[Path]:
    """Write NAME_overlay.png, the image in its classes' colours and a legend, to `out`.

    files: as `find` returns them. labels: write NAME_labels.png too, a palette PNG
    whose values are the class numbers. samples: of Monte-Carlo dropout, if any (see
    `sample`): NAME_uncertainty.png is written too, the standard deviation in grey,
    white being the most there can be. Yields each overlay's path as it is written.
    Raises DataError for a damaged file before anything is written, ConfigError for a
    result that would overwrite one of the files, and as `predict` and `sample` do,
    DiskError where the disk is full or read-only.
    """
    names, colors = classes(pruned)
    stems = stems_of(files)
    check_apart(files, out, stems)
    for file in files:  # all are looked at first: no work is half done
        read_image(file)
    size = size_to_run_at(pruned, size, batch)
    if samples:
        _check_dropout(pruned)
    out.mkdir(parents=True, exist_ok=True)
    images, inputs = tee(read_image(file) for file in files)
    pairs: Iterator[tuple[np.ndarray, np.ndarray | None]]
    if samples:
        pairs = sample(pruned, inputs, samples=samples, size=size, batch=batch)  # type: ignore[assignment]
    else:
        found = predict(pruned, inputs, size=size, batch=batch)
        pairs = ((answer, None) for answer in found)
    for stem, image, (answer, variance) in zip(stems, images, pairs, strict=True):
        picture = report.overlay(image, answer, colors, opacity=opacity)
        target = out / f"{stem}_overlay.png"
        report.save_png(target, report.with_legend(picture, names, colors))
        if labels:
            made = label_picture(answer, colors)
            report.save_png(out / f"{stem}_labels.png", made)
        if variance is not None:
            _save_variance(out / f"{stem}_uncertainty.png", variance, len(names))
        yield target


def classes(pruned: Any) -> tuple[list[str], list[list[int]]]:
    """Class names and colours [K, 3] that were saved with the network.

    Raises CheckpointError where it was saved without.
    """
    known = (pruned.info or {}).get("classes")
    if not known:
        raise base.CheckpointError(
            "the saved network names no classes, so its labels have no colours; save "
            "it with classes={'names': [...], 'colors': [[r, g, b], ...]}"
        )
    match known:
        case {"names": [*names], "colors": [*colors]} if _are_classes(names, colors):
            return names, [list(color) for color in colors]
    raise base.CheckpointError(
        f"the saved network's classes are {known!r:.80}, not {{'names': [...], "
        "'colors': [[r, g, b], ...]}"
    )


def _are_classes(names: list[Any], colors: list[Any]) -> bool:
    """Whether there is a text and a colour, three numbers from 0 to 255, for each."""
    return len(names) == len(colors) and all(
        isinstance(name, str)
        and isinstance(color, list | tuple)
        and len(color) == 3
        and all(isinstance(c, int) and 0 <= c <= 255 for c in color)
        for name, color in zip(names, colors)
    )


def label_picture(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> Any:
    """uint8[H, W] as a palette picture of PIL, whose values are the class numbers."""
    from PIL import Image

    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    picture = Image.fromarray(labels)
    picture.putpalette(palette.ravel().tolist())
    return picture


def _expand(entry: str | Path) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES]
        files = [p for p in files if p.is_file() and not p.name.startswith(".")]
        if not files:
            raise base.DataError(
                f"{path} holds no image ({', '.join(SUFFIXES)}); name another folder"
            )
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(str(entry)):
        raise base.DataError(
            f"{path} does not exist; name an image, a folder or a glob"
        )
    files = sorted(Path(p) for p in glob.glob(str(entry), recursive=True))
    files = [p for p in files if p.is_file()]
    if not files:
        raise base.DataError(f"no file matches {entry!s}")
    return files


def check_apart(files: Sequence[Path], out: Path, stems: Sequence[str]) -> None:
    """Raise ConfigError where a result, of one of the stems, would replace a file."""
    given = {file.resolve() for file in files}
    for stem in stems:
        for kind in ("overlay", "labels", "uncertainty"):
            target = out / f"{stem}_{kind}.png"
            if target.resolve() in given:
                raise base.ConfigError(
                    f"{target} is one of the inputs, and a result would overwrite it; "
                    "write to another folder with --out, or name the images alone"
                )


def stems_of(files: Sequence[Path]) -> list[str]:
    """A name for each file's results: the stem, or more of the path where two agree."""
    root = os.path.commonpath([file.resolve().parent for file in files])
    inner = [file.resolve().relative_to(root) for file in files]
    for stems in (
        [path.stem for path in inner],
        [path.name for path in inner],
        ["_".join(path.parts) for path in inner],
    ):
        if len(set(stems)) == len(stems):
            return stems
    raise base.DataError(
        f"results for the files below {root} would have the same names; predict them "
        "in two calls with different --out folders"
    )


def _compiled(pruned: Any) -> Any:
    """The network as a jitted function: variables, uint8 images -> logits."""

    @jax.jit
    def run(variables: Any, images: jax.Array) -> jax.Array:
        return pruned.apply(variables, images.astype(jnp.float32) / 255, train=False)

    return run


def _sampler(pruned: Any, samples: int) -> Any:
    """Jitted: variables, uint8 images, key -> mean and variance of probabilities."""

    @jax.jit
    def run(variables: Any, images: jax.Array, key: jax.Array) -> Any:
        scaled = images.astype(jnp.float32) / 255

        def add(sums: Any, one: jax.Array) -> Any:
            more = {"train": False, "sample": True, "rngs": {"dropout": one}}
            given = jax.nn.softmax(pruned.apply(variables, scaled, **more))
            return (sums[0] + given, sums[1] + given**2), None

        keys = jax.random.split(key, samples)
        zero = jnp.zeros_like(pruned.apply(variables, scaled, train=False))
        (total, squares), _ = jax.lax.scan(add, (zero, zero), keys)
        mean = total / samples
        return mean, jnp.maximum(squares / samples - mean**2, 0)

    return run


def _check_dropout(pruned: Any) -> None:
    network = (pruned.info or {}).get("network")
    if (
        isinstance(network, dict)
        and "args" in network
        and not network["args"].get("dropout")
    ):
        raise base.ConfigError(
            f"this {network['name']} was trained without dropout, so its samples would "
            "all be the same; train a segnet or fcn with --set network.dropout=0.5"
        )


def _inputs(
    pruned: Any,
    images: Iterable[np.ndarray],
    size: Size | Literal["native"] | None,
    batch: int,
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """(some images, the same at the network's size, filled up to a whole batch)."""
    at = size_to_run_at(pruned, size, batch)
    for some in _batches(images, batch, alike=at == "native"):
        shape = some[0].shape[:2] if at == "native" else at
        inputs = [_resized(image, shape) for image in some]
        inputs += inputs[:1] * (batch - len(some))  # one shape, one compilation
        yield some, np.stack(inputs)


def size_to_run_at(
    pruned: Any, size: Size | Literal["native"] | None, batch: int
) -> Size | Literal["native"]:
    """The given one, or else the training size; ConfigError for none, or no room."""
    if size is None:
        way = "--size HxW, or --size native"
        size = image_size(pruned.info, "the saved network", way)
    if size != "native":
        check_room(size, batch)
    return size


def _batches(
    images: Iterable[np.ndarray], batch: int, *, alike: bool
) -> Iterator[list[np.ndarray]]:
    """Lists of up to `batch` images; `alike`: of neighbours of one size only."""
    if not alike:
        stream = iter(images)
        while some := list(islice(stream, batch)):
            yield some
        return
    some = []
    for image in images:
        if some and (len(some) == batch or image.shape != some[0].shape):
            yield some
            some = []
        some.append(image)
    if some:
        yield some


def _resized(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8[H, W, 3] at another size, by the filter that training data went through."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _labels(logits: np.ndarray, size: Size) -> np.ndarray:
    """uint8[H, W] of the largest of logits[h, w, K], each scaled to H, W first."""
    if logits.shape[:2] == tuple(size):
        return logits.argmax(-1).astype(np.uint8)
    best = np.full(size, -np.inf, np.float32)
    labels = np.zeros(size, np.uint8)
    for k in range(logits.shape[-1]):  # one plane at a time: K of them can be large
        scores = _plane(logits[..., k], size)
        labels[scores > best] = k
        best = np.maximum(best, scores)
    return labels


def _plane(values: np.ndarray, size: Size) -> np.ndarray:
    """float32[H, W] of numbers [h, w], scaled."""
    from PIL import Image

    plane = Image.fromarray(np.ascontiguousarray(values, np.float32))
    height, width = size
    return np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floats, as uint8; what fits 8 bits stays."""
    peak = float(values.max(initial=0))
    if values.dtype.kind == "f" and peak <= 1:
        scale = 255.0
    else:
        scale = 1.0 if peak <= 255 else 255 / 65535
    return np.clip(np.round(values * scale), 0, 255).astype(np.uint8)


def _save_variance(file: Path, variance: np.ndarray, classes: int) -> None:
    """Its root in grey; of K probabilities the mean one is (1 - 1/K) / K at most."""
    most = (1 - 1 / classes) / classes or 1.0
    grey = np.round(255 * np.sqrt(np.clip(variance / most, 0, 1)))
    report.save_png(file, grey.astype(np.uint8))
