# SPDX-License-Identifier: Apache-2.0
"""Frames one after another: of videos, of standard input, of folders; and out again.

Nothing here holds more than a batch of frames, however long the stream.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from jaxprune import predict, report
from jaxprune.base import ConfigError, DataError

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
STDIN = "-"
_PNG, _JPEG = b"\x89P", b"\xff\xd8"
# Neither stuffing, fill bytes nor a restart.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_MOST_HEAD = 1000  # bytes of fill or text before there is a number
# A frame larger than this is no frame, but a damaged header.
_MOST = 1 << 28


class Source(NamedTuple):
    """A name for what is written of it, and '-', a video or an image file."""

    name: str
    entry: str | Path


class Frame(NamedTuple):
    """A name for what is written of it, and the image, uint8[H, W, 3]."""

    name: str
    image: np.ndarray


def is_stream(entry: str | Path) -> bool:
    """Whether an input is a video or standard input, rather than image files."""
    return str(entry) == STDIN or Path(entry).suffix.lower() in VIDEOS


def find(inputs: Sequence[str | Path]) -> list[Source]:
    """What `inputs` name, in order: videos, '-', and whatever `predict.find` finds.

    Raises DataError, before any is read, for an input that is missing, for a video
    without the package that reads it, and for two whose frames would have one name.
    """
    found: dict[str | Path, None] = {}
    for entry in inputs:
        if not is_stream(entry):
            found.update(dict.fromkeys(predict.find([entry])))
            continue
        entry = STDIN if str(entry) == STDIN else Path(entry)
        if entry in found:
            raise DataError(f"{entry} is named twice")
        if isinstance(entry, Path):
            _check_video(entry)
        found[entry] = None
    files = [Path(entry) for entry in found if not is_stream(entry)]
    stems = dict(zip(files, predict.stems_of(files))) if files else {}
    named = [
        Source("stdin" if e == STDIN else stems.get(Path(e), Path(e).stem), e)
        for e in found
    ]
    seen: dict[str, str | Path] = {}
    for name, entry in named:
        if name in seen:
            raise DataError(
                f"the results of {seen[name]} and {entry} would have the same names; "
                "predict them in two calls with different --out folders"
            )
        seen[name] = entry
    return named


def frames(
    inputs: Sequence[str | Path],
    raw: predict.Size | None = None,
    stdin: BinaryIO | None = None,
    out: Path | None = None,
) -> Iterator[Frame]:
    """The frames of `inputs` in order, as `find` names them.

    '-' is standard input (or `stdin`): PNG, JPEG and PPM images one after another, or,
    with raw=(H, W), bare RGB frames of 3 H W bytes; each picture of a file of several,
    as of some phones (MPO), is a frame. Nothing is read beyond a frame that a pipe has
    not given yet. out: the folder of the results. Raises, at once, what `find` does,
    and ConfigError for raw without '-', or where a result would replace an input; then
    DataError that names the input, or the number of the frame, for what is empty,
    damaged or cut off.
    """
    sources = find(inputs)
    if raw and all(source.entry != STDIN for source in sources):
        raise ConfigError("--raw says how frames of standard input lie: name -")
    if out is not None:
        images = [s for s in sources if not is_stream(s.entry)]
        files, names = [Path(s.entry) for s in images], [s.name for s in images]
        predict.check_apart(files, out, names)
    return _read(sources, raw, stdin)


def _read(
    sources: Sequence[Source], raw: predict.Size | None, stdin: BinaryIO | None
) -> Iterator[Frame]:
    for name, entry in sources:
        if entry == STDIN:
            stream = stdin if stdin is not None else sys.stdin.buffer
            with _peekable(stream) as ahead:
                images = _raw(ahead, raw) if raw else _images(ahead)
                yield from _named(name, images, "standard input")
        elif is_stream(entry):
            yield from _named(name, _video(Path(entry)), str(entry))
        else:
            yield Frame(name, predict.read_image(Path(entry)))


def write(
    pruned: Any,
    source: Iterable[Frame],
    out: Path | BinaryIO,
    *,
    size: predict.Size | Literal["native"] | None = None,
    batch: int = 4,
    opacity: float = 0.5,
    labels: bool = False,
) -> Iterator[str]:
    """Overlays of frames as they come, into a folder, or one by one into a stream.

    Into a folder as `predict.write` does; into a stream PNGs, of the labels with
    `labels`, else of the overlays. Yields each file's path, or the frame's name. A
    DataError of `source` is raised once the frames before it are out. Raises DataError
    for two frames of one name in a folder, ConfigError, CheckpointError and DiskError
    as `predict.write`.
    """
    names, colors = predict.classes(pruned)
    size = predict.size_to_run_at(pruned, size, batch)
    damage: list[DataError] = []
    first, second = tee(_until_damaged(source, damage))
    found = predict.predict(pruned, (f.image for f in first), size=size, batch=batch)
    seen: set[str] = set()
    for frame, answer in zip(second, found, strict=True):
        picture = report.overlay(frame.image, answer, colors, opacity=opacity)
        if not isinstance(out, Path):
            made = predict.label_picture(answer, colors) if labels else picture
            out.write(report.as_png(made))
            out.flush()
            yield frame.name
            continue
        if frame.name in seen:
            raise DataError(
                f"two frames are named {frame.name}, and would overwrite each other; "
                "predict them in two calls with different --out folders"
            )
        seen.add(frame.name)
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{frame.name}_overlay.png"
        report.save_png(target, report.with_legend(picture, names, colors))
        if labels:
            made = predict.label_picture(answer, colors)
            report.save_png(out / f"{frame.name}_labels.png", made)
        yield str(target)
    if damage:
        raise damage[0]


def _until_damaged(source: Iterable[Frame], damage: list[DataError]) -> Iterator[Frame]:
    """The frames before the first error, which is noted: they may fill half a batch."""
    try:
        yield from source
    except DataError as error:
        damage.append(error)


def _named(stem: str, images: Iterable[np.ndarray], what: str) -> Iterator[Frame]:
    i = -1
    for i, image in enumerate(images):
        yield Frame(f"{stem}_{i:06d}", image)
    if i < 0:  # such as behind a pipe whose first command failed
        raise DataError(f"{what} is empty: there is no frame in it")


def _check_video(file: Path) -> None:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise DataError(
            f"{file} is a video, which needs the package imageio-ffmpeg: pip install "
            "'jaxprune[video]'; or give a folder of its frames"
        )
    if not file.is_file():
        raise DataError(f"{file} does not exist; name a video, a folder or '-'")


def _video(file: Path) -> Iterator[np.ndarray]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(file), pix_fmt="rgb24")
    try:
        width, height = next(reader)["size"]
        for content in reader:
            yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or ["no frames"]
        raise DataError(f"{file}: damaged, or no video: {lines[-1]}") from error
    finally:
        reader.close()


@contextlib.contextmanager
def _peekable(stream: BinaryIO) -> Iterator[Any]:
    """The stream, buffered if it is not, so that what is there can be looked at."""
    if hasattr(stream, "peek"):
        yield stream
        return
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]
    try:
        yield buffered
    finally:
        buffered.detach()  # which would close it


def _raw(stream: BinaryIO, size: predict.Size) -> Iterator[np.ndarray]:
    number, (height, width) = 0, size
    while content := _some(stream, 3 * height * width):
        if len(content) < 3 * height * width:
            raise DataError(
                f"frame {number} of standard input ends after {len(content)} of "
                f"{3 * height * width} bytes; is --raw {height}x{width} its size?"
            )
        yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
        number += 1


def _images(stream: Any) -> Iterator[np.ndarray]:
    number = 0
    while start := _some(stream, 2):
        where = f"frame {number} of standard input"
        if start == _PNG:
            kind, content = ".png", _png(stream, where)
        elif start == _JPEG:
            kind, content = ".jpg", _jpeg(stream, where)
        elif start in (b"P5", b"P6"):
            kind, content = ".ppm", _ppm(stream, 3 if start == b"P6" else 1, where)
        else:
            raise DataError(
                f"{where} is no PNG, JPEG or PPM: it begins with {start!r}; bare RGB "
                "frames need --raw HxW"
            )
        yield predict.read_image(Path(f"{where}{kind}"), start + content)
        number += 1


def _png(stream: BinaryIO, where: str) -> bytes:
    """The rest of a PNG: chunks of a length, a name, that many bytes and a checksum."""
    parts, name = [_exactly(stream, 6, where)], b""
    while name != b"IEND":
        head = _exactly(stream, 8, where)
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        parts += [head, _exactly(stream, length + 4, where)]
    return b"".join(parts)


def _jpeg(stream: Any, where: str) -> bytes:
    """The rest of a JPEG: segments, and scans up to the next marker."""
    parts = [_marker(stream, where)]
    while True:
        marker = parts[-1][-2:]
        if marker == b"\xff\xd9":
            return b"".join(parts)
        if marker[0] != 0xFF or marker[1] == 0xFF:
            raise DataError(f"{where}: damaged JPEG, no marker but {marker!r}")
        length = _exactly(stream, 2, where)
        body = _exactly(stream, max(int.from_bytes(length, "big") - 2, 0), where)
        scan = marker == b"\xff\xda"
        parts += [length, body, (_scan if scan else _marker)(stream, where)]


def _marker(stream: BinaryIO, where: str) -> bytes:
    """A marker; any number of bytes 0xff may be before it (T.81, B.1.1.2)."""
    found = _exactly(stream, 2, where)
    while not found.strip(b"\xff") and len(found) < _MOST_HEAD:
        found += _exactly(stream, 1, where)
    return found


def _scan(stream: Any, where: str) -> bytes:
    """Compressed bytes up to and with a marker; looks at what is buffered already."""
    found = bytearray()
    while len(found) < _MOST:
        ahead = stream.peek()
        if not ahead:
            raise DataError(f"{where}: it ends too early")
        last = found[-1:]
        match = _MARKER.search(last + ahead)
        found += stream.read(match.end() - len(last) if match else len(ahead))
        if match:
            return bytes(found)
    raise DataError(f"{where}: damaged JPEG, it has no end")


def _ppm(stream: BinaryIO, channels: int, where: str) -> bytes:
    """The rest of a PPM or PGM: width, height and peak in text, then the pixels."""
    head, word, numbers = bytearray(), b"", list[int]()
    while len(numbers) < 3:
        byte = _exactly(stream, 1, where)
        head += byte
        if byte == b"#":  # a comment, to the end of the line
            while byte != b"\n" and len(head) < _MOST_HEAD:
                byte = _exactly(stream, 1, where)
                head += byte
        if byte.isspace():
            numbers += [int(word)] if word else []
            word = b""
        else:
            word += byte
            if not word.isdigit() or len(head) > _MOST_HEAD:
                raise DataError(f"{where}: damaged PPM header {bytes(head)!r}")
    width, height, peak = numbers
    size = width * height * channels * (1 if peak < 256 else 2)
    return bytes(head) + _exactly(stream, size, where)


def _exactly(stream: BinaryIO, size: int, where: str) -> bytes:
    if size > _MOST:
        raise DataError(f"{where}: damaged, {size} bytes in one piece")
    content = _some(stream, size)
    if len(content) < size:
        raise DataError(f"{where}: it ends too early")
    return content


def _some(stream: BinaryIO, size: int) -> bytes:
    """So many bytes, in the parts that a pipe gives; fewer only at the end."""
    parts, left = [], size
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
