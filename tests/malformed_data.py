# SPDX-License-Identifier: Apache-2.0
"""Malformed images, data sets and files of arrays: what is wrong, and the input."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 16)
NAMES = ("image0", "image1", "image2")


def encoded(array, mode=None, form="PNG", **more) -> bytes:
    """An array as the bytes of an image file."""
    image = Image.fromarray(np.asarray(array))
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, form, **more)
    return stream.getvalue()


RGB = encoded(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(*SIZE, 3))
JPEG = encoded(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(*SIZE, 3), form="JPEG")
LABEL = encoded(np.arange(12 * 16, dtype=np.uint8).reshape(SIZE) % 3)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body))
    )


def png(width: int, height: int, pixels: bytes, kind: int = 2, depth: int = 8) -> bytes:
    """A PNG whose header claims what it likes, its checksums right."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


# An image file's name and bytes; `predict` names the file.
IMAGES = [
    ("empty", "x.png", b""),
    ("one byte", "x.png", b"\x89"),
    ("a signature alone", "x.png", RGB[:8]),
    ("a header alone", "x.png", RGB[:33]),
    ("cut in the pixels", "x.png", RGB[: len(RGB) // 2]),
    ("without its end", "x.png", RGB[:-20]),
    ("a flipped bit", "x.png", RGB[:60] + bytes([RGB[60] ^ 1]) + RGB[61:]),
    ("a checksum of another", "x.png", RGB[:29] + b"\0\0\0\0" + RGB[33:]),
    ("0 pixels wide", "x.png", png(0, 4, b"")),
    ("2^31 pixels wide", "x.png", png(2**31 - 1, 2**31 - 1, b"")),
    ("a bomb of 10^10 pixels", "x.png", png(100_000, 100_000, bytes(10**6))),
    ("fewer pixels than said", "x.png", png(64, 64, bytes(100))),
    ("no such kind of colour", "x.png", png(4, 4, bytes(100), kind=5)),
    ("depth 3", "x.png", png(4, 4, bytes(100), depth=3)),
    ("text", "x.png", b"an image, honestly"),
    ("HTML", "x.png", b"<!DOCTYPE html><title>404</title>"),
    ("JSON", "x.png", b'{"pixels": []}'),
    ("a zip", "x.png", b"PK\x05\x06" + bytes(18)),
    ("half a JPEG", "x.jpg", JPEG[: len(JPEG) // 2]),
    ("a JPEG's beginning", "x.jpg", JPEG[:20]),
    ("a JPEG without scan", "x.jpg", JPEG[:2] + JPEG[-2:]),
    ("half a BMP", "x.bmp", encoded(np.zeros((8, 8, 3), np.uint8), form="BMP")[:80]),
    ("half a GIF", "x.gif", encoded(np.zeros((8, 8), np.uint8), form="GIF")[:20]),
    ("half a TIFF", "x.tif", encoded(np.zeros((8, 8), np.uint8), form="TIFF")[:40]),
    ("a PPM of 10^15", "x.ppm", b"P6 1000000000 1000000 255\n" + bytes(10)),
    ("a PPM without size", "x.ppm", b"P6 x y 255\n"),
]


def write_set(root: Path, split: str = "train") -> None:
    """A good data set of three pairs, in CamVid's layout."""
    for folder, content in ((split, RGB), (f"{split}annot", LABEL)):
        (root / folder).mkdir(parents=True)
        for name in NAMES:
            (root / folder / f"{name}.png").write_bytes(content)


def _image(name: str, content: bytes):
    return lambda root: (root / "train" / name).write_bytes(content)


def _mask(content: bytes):
    return lambda root: (root / "trainannot" / "image1.png").write_bytes(content)


def _labels(array, mode=None, **more):
    return _mask(encoded(array, mode, **more))


def _all_labels(*labels: int):
    """Masks of these labels in turns, all of the set."""
    array = np.resize(np.array(labels, np.uint8), SIZE)

    def harm(root: Path) -> None:
        for name in NAMES:
            (root / "trainannot" / f"{name}.png").write_bytes(encoded(array))

    return harm


def _gone(name: str):
    def harm(root: Path) -> None:
        path = root / name
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()

    return harm


def _renamed(name: str, other: str):
    return lambda root: (root / name).rename(root / other)


def _emptied(root: Path) -> None:
    for file in [*(root / "train").iterdir(), *(root / "trainannot").iterdir()]:
        file.unlink()


def _classes(text):
    content = text if isinstance(text, str) else json.dumps(text)
    return lambda root: (root / "classes.json").write_text(content)


_ZEROS = np.zeros(SIZE, np.uint8)
_ABC = ["a", "b", "c"]
_RED = [[255, 0, 0]] * 3

# What is done to the folder, and what the error names.
FOLDERS = [
    ("no folder of images", _gone("train"), "train"),
    ("no folder of masks", _gone("trainannot"), "trainannot"),
    ("a folder misspelt", _renamed("trainannot", "trainmasks"), "trainannot"),
    ("no images at all", _emptied, "train: holds no images"),
    ("an image without mask", _gone("trainannot/image1.png"), "image1"),
    ("a mask without image", _gone("train/image1.png"), "image1"),
    (
        "a mask of another name",
        _renamed("trainannot/image1.png", "trainannot/image1_L.png"),
        "image1",
    ),
    ("an image twice", _image("image1.jpg", JPEG), "image1"),
    (
        "an image cut short",
        _image("image1.png", RGB[: len(RGB) // 2]),
        "train/image1.png",
    ),
    ("an image that is text", _image("image1.png", b"x"), "train/image1.png"),
    ("an empty image", _image("image1.png", b""), "train/image1.png"),
    ("a bomb", _image("image1.png", png(10**5, 10**5, b"")), "train/image1.png"),
    (
        "an image of 16 bits",
        _image("image1.png", encoded(np.zeros(SIZE, np.uint16))),
        "train/image1.png",
    ),
    (
        "an image of another size",
        _image("image1.png", encoded(np.zeros((8, 8, 3), np.uint8))),
        "image1.png",
    ),
    ("a mask cut short", _mask(LABEL[:60]), "trainannot/image1.png"),
    ("a mask that is text", _mask(b"0 1 2"), "trainannot/image1.png"),
    ("a mask of colours", _mask(RGB), "trainannot/image1.png"),
    ("a mask of 16 bits", _labels(np.zeros(SIZE, np.uint16)), "trainannot/image1.png"),
    (
        "a mask of 32 bits",
        _labels(np.zeros(SIZE, np.int32), form="TIFF"),
        "trainannot/image1.png",
    ),
    ("a mask of one bit", _labels(_ZEROS, "1"), "trainannot/image1.png"),
    ("a mask with alpha", _labels(_ZEROS, "LA"), "trainannot/image1.png"),
    ("a mask of another size", _labels(np.zeros((8, 8), np.uint8)), "image1.png"),
    ("a mask that is turned", _labels(_ZEROS.T), "image1.png"),
    (
        "a label that no class has",
        lambda r: (_classes({"names": _ABC})(r), _labels(_ZEROS + 7)(r)),
        "trainannot/image1.png: label 7",
    ),
    (
        "a label 254 of 3",
        lambda r: (_classes({"names": _ABC})(r), _labels(_ZEROS + 254)(r)),
        "trainannot/image1.png: label 254",
    ),
    ("classes.json that is none", _classes("names: a, b"), "classes.json"),
    ("classes.json cut short", _classes('{"names": ["a"'), "classes.json"),
    ("classes.json too deep", _classes("[" * 10**5), "classes.json"),
    ("classes.json a list", _classes(_ABC), "classes.json"),
    ("no names", _classes({"colors": _RED}), "classes.json"),
    ("no name in it", _classes({"names": []}), "classes"),
    ("names a number", _classes({"names": 3}), "classes.json"),
    ("300 names", _classes({"names": _ABC * 100}), "classes"),
    ("a colour too few", _classes({"names": _ABC, "colors": _RED[:2]}), "colors"),
    ("a colour of two", _classes({"names": _ABC, "colors": [[1, 2]] * 3}), "classes"),
    ("a colour a text", _classes({"names": _ABC, "colors": ["red"] * 3}), "classes"),
    ("a colour of 300", _classes({"names": _ABC, "colors": [[300, 0, 0]] * 3}), "300"),
    ("a colour below 0", _classes({"names": _ABC, "colors": [[0, -1, 0]] * 3}), "-1"),
    (
        "colours up to 1",
        _classes({"names": _ABC, "colors": [[0.5, 1, 0]] * 3}),
        "float",
    ),
    ("masks of 0 and 255", _all_labels(0, 255), "labels 0, 255, of which 255 is ign"),
    ("masks of 0 and 128", _all_labels(0, 128), "129 classes, 127 of them nowhere"),
    (
        "a mask as JPEG",
        lambda r: (
            _gone("trainannot/image1.png")(r),
            (r / "trainannot" / "image1.jpg").write_bytes(
                encoded(_ZEROS, "L", form="JPEG")
            ),
        ),
        "trainannot/image1.jpg: a mask as JPEG",
    ),
    ("ignore a class", _classes({"names": _ABC, "ignore": 1}), "ignore = 1"),
    ("ignore 256", _classes({"names": _ABC, "ignore": 256}), "ignore = 256"),
    ("ignore a text", _classes({"names": _ABC, "ignore": "void"}), "classes.json"),
]


def _text(name: str, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda home: (home / name).write_bytes(content)


def _shard(change):
    def harm(home: Path) -> None:
        (file,) = home.glob("*train.array_record*")
        content = change(file.read_bytes())
        file.unlink() if content is None else file.write_bytes(content)

    return harm


def _other_class(home: Path) -> None:
    file = home / "features.json"
    text = file.read_text().replace("tensorflow_datasets.core", "somebody.else")
    file.write_text(text)


# What is done to a data set that TFDS prepared; the error names its folder.
TFDS = [
    ("no dataset_info.json", lambda home: (home / "dataset_info.json").unlink()),
    ("dataset_info.json empty", _text("dataset_info.json", "")),
    ("dataset_info.json that is none", _text("dataset_info.json", "name: x")),
    ("dataset_info.json a list", _text("dataset_info.json", "[]")),
    ("dataset_info.json too deep", _text("dataset_info.json", "[" * 10**5)),
    ("dataset_info.json of bytes", _text("dataset_info.json", b"\xff\xfe")),
    ("no features.json", lambda home: (home / "features.json").unlink()),
    ("features.json empty", _text("features.json", "")),
    ("features.json a list", _text("features.json", "[]")),
    ("features.json without type", _text("features.json", "{}")),
    ("features.json too deep", _text("features.json", "[" * 10**5)),
    ("a feature of another module", _other_class),
    ("no shard", _shard(lambda whole: None)),
    ("an empty shard", _shard(lambda whole: b"")),
    ("half a shard", _shard(lambda whole: whole[: len(whole) // 2])),
    ("a shard of text", _shard(lambda whole: b"x" * 3000)),
    ("a shard of zeros", _shard(lambda whole: bytes(len(whole)))),
]


def npz(**arrays) -> bytes:
    """A good archive."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def claims(header: str, content: bytes = b"", name: str = "w.npy", **more) -> bytes:
    """An archive of one array whose header says what it likes."""
    text = header.encode().ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **more) as archive:
        archive.writestr(name, array)
    return stream.getvalue()


def _header(descr="'<f4'", shape="(2,)", order="False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


def _bomb() -> bytes:
    """64 MiB of zeros in 64 KiB, of an array that claims two numbers."""
    return claims(_header(), bytes(1 << 26), compression=zipfile.ZIP_DEFLATED)


def _safetensors(header, content: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_GOOD = npz(w=np.ones(2, np.float32))
_OBJECTS = claims(_header("'|O'"), b"\x80\x04cos\nsystem\n(S'true'\ntR.")

# An encoder's file; the error names it.
ENCODERS = [
    ("no such file", "none.npz", None),
    ("another suffix", "x.pth", b"\x80\x02"),
    ("no suffix", "x", b""),
    ("empty", "x.npz", b""),
    ("text", "x.npz", b"weights"),
    ("a pickle", "x.npz", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    ("an archive cut short", "x.npz", _GOOD[:-30]),
    ("a flipped bit", "x.npz", _GOOD.replace(b"\0\0\x80?", b"\0\1\x80?", 1)),
    ("an empty archive", "x.npz", npz()),
    ("no array in it", "x.npz", claims("", name="readme.txt")),
    ("other arrays", "x.npz", _GOOD),
    ("objects", "x.npz", _OBJECTS),
    ("10^15 numbers", "x.npz", claims(_header(shape="(10**15,)"))),
    ("10^15 numbers, written out", "x.npz", claims(_header(shape=f"({10**15},)"))),
    ("more numbers than bytes", "x.npz", claims(_header(shape="(9,)"), bytes(8))),
    ("a bomb", "x.npz", _bomb()),
    ("a shape of -1", "x.npz", claims(_header(shape="(-1,)"), bytes(8))),
    ("a shape of text", "x.npz", claims(_header(shape="'ab'"), bytes(8))),
    ("code for a shape", "x.npz", claims(_header(shape="__import__('os')"))),
    ("a header of brackets", "x.npz", claims("(" * 100)),
    ("no dtype", "x.npz", claims(_header("'zz'"), bytes(8))),
    ("a name that leads out", "x.npz", claims(_header(), bytes(8), "../../w.npy")),
    ("empty", "x.safetensors", b""),
    ("text", "x.safetensors", b"weights, honestly"),
    ("a header of 2^63", "x.safetensors", _safetensors({}, size=2**63)),
    ("a header cut short", "x.safetensors", _safetensors({"w": _F32}, size=999)),
    ("a header that is no JSON", "x.safetensors", _safetensors(b"{'w'}")),
    ("a header too deep", "x.safetensors", _safetensors(b"[" * 10**5)),
    ("fewer bytes than said", "x.safetensors", _safetensors({"w": _F32}, bytes(4))),
    ("more bytes than said", "x.safetensors", _safetensors({"w": _F32}, bytes(9))),
    (
        "10^15 numbers",
        "x.safetensors",
        _safetensors({"w": _F32 | {"shape": [10**15]}}, bytes(8)),
    ),
    (
        "offsets that go back",
        "x.safetensors",
        _safetensors({"w": _F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    ),
    (
        "a dtype of its own",
        "x.safetensors",
        _safetensors({"w": _F32 | {"dtype": "F3"}}, bytes(8)),
    ),
    ("other arrays", "x.safetensors", _safetensors({"w": _F32}, bytes(8))),
]
