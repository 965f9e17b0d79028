# SPDX-License-Identifier: Apache-2.0
"""Frames of videos and of standard input, and labels that leave as they are made."""

from __future__ import annotations

import io
import os
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxprune import checkpoint, cli, exits, inspection, streams
from jaxprune.base import ConfigError, DataError

INFO = {
    "classes": {"names": ["red", "blue"], "colors": [[230, 159, 0], [0, 114, 178]]},
    "size": [8, 12],
}


def apply(variables: Any, images: Any, train: bool = False) -> Any:
    """A network of no memory: class 0 where red leads, else 1."""
    return jnp.stack([images[..., 0], images[..., 2]], -1)


NET = types.SimpleNamespace(apply=apply, variables={}, info=INFO)


def images(count: int, height: int = 8, width: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format=kind, **options)
    return content.getvalue()


class Pipe(io.BytesIO):
    """Gives at most 7 bytes at once, as a pipe may."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:7])


def read(content: bytes, raw: Any = None) -> list[streams.Frame]:
    return list(streams.frames(["-"], raw, Pipe(content)))


def test_images_one_after_another() -> None:
    kinds = [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("PPM", {}),
        ("JPEG", {"progressive": True, "restart_marker_blocks": 1}),
        ("PNG", {"optimize": True}),
    ]
    given = images(5, 33, 21)
    parts = [encoded(x, kind, **more) for x, (kind, more) in zip(given, kinds)]
    parts.insert(3, b"P5 # a comment\n# more\n 4\n2 255\n" + bytes(range(8)))
    found = read(b"".join(parts))
    assert [f.name for f in found] == [f"stdin_{i:06d}" for i in range(6)]
    grey = found.pop(3).image
    np.testing.assert_array_equal(grey[..., 0], np.arange(8).reshape(2, 4))
    for want, frame, (kind, _), part in zip(
        given, found, kinds, parts[:3] + parts[4:], strict=True
    ):
        if kind == "JPEG":
            want = np.asarray(Image.open(io.BytesIO(part)))
        np.testing.assert_array_equal(frame.image, want)


def test_fill_bytes_before_a_marker_are_skipped() -> None:
    jpeg = encoded(images(1)[0], "JPEG")
    at = jpeg.index(b"\xff\xda")
    filled = (
        jpeg[:2] + b"\xff" * 3 + jpeg[2:at] + b"\xff" + jpeg[at:-2] + b"\xff\xff\xd9"
    )
    want = np.asarray(Image.open(io.BytesIO(jpeg)))
    for frame in read(filled + jpeg + filled):
        np.testing.assert_array_equal(frame.image, want)
    with pytest.raises(DataError, match="damaged JPEG, no marker"):
        read(jpeg[:2] + b"\xff" * 9999)


def test_a_frame_of_a_live_pipe_does_not_wait_for_the_next() -> None:
    parts = [encoded(x, kind) for x, kind in zip(images(3), ("JPEG", "PNG", "JPEG"))]
    source, sink = os.pipe()
    with open(source, "rb") as reader, open(sink, "wb", buffering=0) as writer:
        found = streams.frames(["-"], None, reader)
        for part, more in zip(parts, (parts[1][:9], b"", b""), strict=True):
            left = part[9:] if part is parts[1] else part
            writer.write(left + more)
            frame = next(found)  # for ever, if it read on
            want = np.asarray(Image.open(io.BytesIO(part)))
            np.testing.assert_array_equal(frame.image, want)


def test_a_jpeg_is_not_read_byte_by_byte() -> None:
    jpeg = encoded(images(1, 480, 640)[0], "JPEG", quality=95)

    calls: list[int] = []

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            calls.append(1)
            return super().read(size)

    content = streams._jpeg(Counted(io.BytesIO(jpeg[2:])), "here")  # type: ignore
    assert jpeg[:2] + content == jpeg
    assert len(calls) < len(jpeg) / 1000


def test_bare_frames() -> None:
    given = images(3)
    found = read(b"".join(x.tobytes() for x in given), (8, 12))
    for want, frame in zip(given, found, strict=True):
        np.testing.assert_array_equal(frame.image, want)
    with pytest.raises(DataError, match="frame 1 of standard input ends after 288 of"):
        read(b"\0" * (432 + 288), (8, 18))


@pytest.mark.parametrize("raw", [None, (8, 12)])
def test_an_input_without_a_frame_is_refused(raw: Any) -> None:
    with pytest.raises(DataError, match="standard input is empty"):
        read(b"", raw)


def test_frames_before_a_damaged_one_are_written(tmp_path: Any) -> None:
    content = b"".join(x.tobytes() for x in images(3)) + b"more"
    source = streams.frames(["-"], (8, 12), Pipe(content))
    written = []
    with pytest.raises(DataError, match="frame 3 of standard input ends after 4 of"):
        written += streams.write(NET, source, tmp_path, batch=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"stdin_{i:06d}_overlay.png" for i in range(3)
    ]


def test_an_input_without_a_frame_leaves_no_folder(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="standard input is empty"):
        list(streams.write(NET, streams.frames(["-"], None, Pipe(b"")), tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM"])
def test_damage_is_named_with_the_frame(kind: str) -> None:
    good, bad = (encoded(x, kind) for x in images(2, 30, 20))
    for cut in (3, 11, len(bad) // 2, len(bad) - 1):
        with pytest.raises(DataError, match="frame 1 of standard input"):
            read(good + bad[:cut])
    if kind == "PNG":
        flipped = bytearray(bad)
        flipped[len(bad) // 2] ^= 1
        with pytest.raises(DataError, match="frame 1 of standard input.png: damaged"):
            read(good + flipped)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GIF89a", "frame 0 .* is no PNG, JPEG or PPM.*--raw HxW"),
        (b"P6\n99999999 9999999 255\n", "damaged, .* bytes in one piece"),
        (b"P6\n-4 4 255\n", "damaged PPM header"),
        (b"\xff\xd8\x00\x11abc", "no marker"),
        (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", "bytes in one piece"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(content)


def test_labels_leave_one_after_another_and_no_more_is_held(tmp_path: Any) -> None:
    given = images(6)
    taken: list[int] = []

    def source() -> Any:
        for i, image in enumerate(given):
            taken.append(i)
            yield streams.Frame(f"f{i}", image)

    out = io.BytesIO()
    ahead = [
        len(taken) - i - 1
        for i, _ in enumerate(streams.write(NET, source(), out, batch=2, labels=True))
    ]
    assert max(ahead) <= 2
    out.seek(0)
    decoded = list(streams.frames(["-"], None, out))
    colors = np.array(INFO["classes"]["colors"])  # type: ignore[index]
    for image, frame in zip(given, decoded, strict=True):
        want = (image[..., 2] > image[..., 0]).astype(int)
        np.testing.assert_array_equal(frame.image, colors[want])

    folder = tmp_path / "out"
    frames = (streams.Frame(f"f{i}", x) for i, x in enumerate(given))
    written = list(streams.write(NET, frames, folder, labels=True))
    assert written == [str(folder / f"f{i}_overlay.png") for i in range(6)]
    labels = np.asarray(Image.open(folder / "f3_labels.png"))
    np.testing.assert_array_equal(labels, given[3][..., 2] > given[3][..., 0])
    twice = (streams.Frame("f", x) for x in given)
    with pytest.raises(DataError, match="two frames are named f"):
        list(streams.write(NET, twice, folder))


def test_the_command_from_standard_input_to_standard_output(monkeypatch: Any) -> None:
    image = images(1)[0]
    out = io.BytesIO()
    text = io.TextIOWrapper(out)
    monkeypatch.setattr(inspection, "saved", lambda folder: folder)
    monkeypatch.setattr(checkpoint, "load", lambda folder: NET)
    monkeypatch.setattr(
        sys, "stdin", types.SimpleNamespace(buffer=Pipe(image.tobytes()))
    )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", text)
        argv = ["predict", "net", "-", "--raw", "8x12", "--out", "-", "--labels"]
        assert cli.main(argv) == 0
    out.seek(0)
    labels = np.asarray(Image.open(out))
    np.testing.assert_array_equal(labels, image[..., 2] > image[..., 0])
    assert cli.main([*argv, "--samples", "3"]) == exits.BAD_INPUT


def test_a_folder_of_frames_comes_in_order(tmp_path: Any) -> None:
    for i, image in enumerate(images(3)):
        (tmp_path / f"frame{i}.png").write_bytes(encoded(image, "PNG"))
    found = list(streams.frames([tmp_path]))
    assert [f.name for f in found] == ["frame0", "frame1", "frame2"]
    # Of one name in two folders, with standard input in front: told apart, in order.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "frame0.png").write_bytes(encoded(images(1)[0], "PNG"))
    named = streams.find(["-", tmp_path, tmp_path / "more", tmp_path / "frame1.png"])
    assert [s.name for s in named] == [
        *("stdin", "frame0.png", "frame1.png", "frame2.png", "more_frame0.png")
    ]


def test_a_video_without_its_package_is_refused(
    tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(DataError, match=r"pip install 'jaxprune\[video\]'"):
        streams.frames(["-", tmp_path / "a.mp4"])


def test_inputs_are_looked_at_before_any_is_read(tmp_path: Any) -> None:
    (tmp_path / "stdin.png").write_bytes(encoded(images(1)[0], "PNG"))
    with pytest.raises(DataError, match="nothere.png does not exist"):
        streams.frames(["-", tmp_path / "nothere.png"], None, Pipe(b""))
    with pytest.raises(DataError, match=r"of - and .*stdin.png would have the same"):
        streams.frames(["-", tmp_path / "stdin.png"], None, Pipe(b""))
    with pytest.raises(DataError, match="- is named twice"):
        streams.frames(["-", "-"], None, Pipe(b""))
    with pytest.raises(ConfigError, match="--raw says how frames of standard input"):
        streams.frames([tmp_path], (8, 12))
    with pytest.raises(ConfigError, match=r"stdin_overlay.png is one of the inputs"):
        (tmp_path / "stdin_overlay.png").write_bytes(b"")
        streams.frames([tmp_path], out=tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_video(tmp_path: Any) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    file = tmp_path / "a.mkv"
    given = images(4, 16, 32)
    options = {"codec": "ffv1", "pix_fmt_in": "rgb24", "pix_fmt_out": "bgr0"}
    writer = ffmpeg.write_frames(str(file), (32, 16), macro_block_size=1, **options)
    writer.send(None)
    for image in given:
        writer.send(image.tobytes())
    writer.close()
    found = list(streams.frames([file]))
    assert [f.name for f in found] == [f"a_{i:06d}" for i in range(4)]
    for want, frame in zip(given, found, strict=True):
        np.testing.assert_array_equal(frame.image, want)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="b.mp4: damaged, or no video"):
        list(streams.frames([tmp_path / "b.mp4"]))
    with pytest.raises(DataError, match="c.mp4 does not exist"):
        list(streams.frames([tmp_path / "c.mp4"]))
