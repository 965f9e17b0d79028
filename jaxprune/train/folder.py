# SPDX-License-Identifier: Apache-2.0
"""The work folder: whose it is, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune import checkpoint, disk, formats, peers
from jaxprune.base import ConfigError
from jaxprune.data import Split
from jaxprune.train import config as configs
from jaxprune.train import settings
from jaxprune.train.config import Config

CONFIG = "config.json"
TIMINGS = "timings.json"
DATA = "data.json"
_LOCK = ".lock"
# Fields that may differ when a run is resumed: they change no result. Of data.root it
# is `check_data` that sees to this; with on_nan = 'skip', save_every does change some.
FREE = ("data.cache", "data.root", "save_every")


def check_free(config: Config, workdir: Path) -> None:
    """Raise ConfigError unless the folder is empty, new, or made by this config."""
    if (workdir / CONFIG).exists():
        changed = _changed(config, workdir)
        if changed:
            raise ConfigError(
                f"{workdir} was made by another config: {', '.join(changed)}; choose "
                "another --workdir, or set this back"
            )
    elif workdir.exists() and not _empty(workdir):
        raise ConfigError(
            f"{workdir} is no work folder (no {CONFIG}), and not empty; choose another "
            "--workdir"
        )


def made_by(config: Config, workdir: Path) -> bool:
    """Whether a work folder is this config's, which may go on with it."""
    return not _changed(config, workdir)


def _empty(workdir: Path) -> bool:
    if not workdir.is_dir():
        return False
    # What another process of this run, or one that was killed, has just begun.
    begun = (CONFIG, f"{CONFIG}.partial", _LOCK)
    return all(path.name in begun for path in workdir.iterdir())


@contextlib.contextmanager
def claim(config: Config, workdir: Path) -> Iterator[None]:
    """Make the folder this config's, and meanwhile this run's alone.

    Raises ConfigError where it cannot be made, is another config's, or another run is
    using it; a file system without locks tells nothing of the last.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{workdir} cannot be made ({error.strerror}); choose another --workdir"
        ) from error
    with _locked(workdir):
        # Another run may have begun here meanwhile; one process looks, as to the others
        # what this one writes appears file by file.
        if jax.process_index() == 0:
            check_free(config, workdir)
            if not (workdir / CONFIG).exists():
                write_text(workdir / CONFIG, configs.to_json(config))
        peers.barrier(f"{workdir} is this run's")
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back however the process ends."""
    with contextlib.ExitStack() as stack:
        free = True
        if jax.process_index() == 0:
            # The file stays: who deletes it may delete the lock of the next.
            with disk.writing(workdir / _LOCK):
                file = stack.enter_context(open(workdir / _LOCK, "a", encoding="utf-8"))
            try:
                import fcntl  # not on every system

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except (ImportError, OSError):
                pass  # there are no locks here
        if not peers.first_says(free):
            raise ConfigError(
                f"{workdir}: another run is using it; wait for its end, or choose "
                "another --workdir"
            )
        yield


def check_data(splits: Sequence[Split], workdir: Path) -> None:
    """Raise ConfigError unless the splits hold what the run began with, wherever it is.

    The first call notes down what that is.
    """
    path = workdir / DATA
    here = {split.name: _contents(split) for split in splits}
    if not path.exists():
        write_json(path, here)
        return
    try:
        there = dict(formats.parse(formats.read_text(path)))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it") from error
    for name, contents in here.items():
        if there.get(name) != contents:
            raise ConfigError(
                f"{workdir}: the split {name!r} is not what this run began with; set "
                "data.root back, or choose another --workdir. To go on with the data "
                f"as they are now, delete {path}"
            )


def _contents(split: Split) -> dict[str, Any]:
    """What tells data apart: count, size, checksums of pixels, names and classes."""
    names = json.dumps([split.stems, dataclasses.asdict(split.classes)])
    sums = {
        "images": zlib.crc32(np.ascontiguousarray(split.images).data),
        "labels": zlib.crc32(np.ascontiguousarray(split.labels).data),
        "names": zlib.crc32(names.encode()),
    }
    return {"count": len(split), "size": list(split.size), "crc32": sums}


def read_config(workdir: Path) -> Config:
    """The config that made a work folder; ConfigError for none, or a damaged one."""
    try:
        return configs.from_json(_text(workdir / CONFIG))
    except OSError as error:
        hint = "give the --workdir of a 'jaxprune run'"
        if checkpoint.is_saved(workdir):
            hint += (
                ". It is a saved network, which names no data: measure it in Python, "
                "jaxprune.load(path, apply=model.apply)"
            )
        raise ConfigError(
            f"{workdir} is no work folder ({CONFIG}: {error.strerror}); {hint}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file all at once, from the first process."""
    if jax.process_index() == 0:
        disk.write(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file all at once, from the first process."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def _text(path: Path) -> str:
    try:
        return formats.read_text(path)
    except ValueError as error:  # no UTF-8
        raise ConfigError(
            f"{path} is damaged ({error}); choose another --workdir"
        ) from error


def _changed(config: Config, workdir: Path) -> list[str]:
    """Where `config` is not a work folder's, but for what changes no result."""
    text = _text(workdir / CONFIG)
    try:
        made = configs.from_json(text)
    except ConfigError as error:
        raise ConfigError(
            f"{workdir / CONFIG}: {error}; choose another --workdir"
        ) from error
    there = settings.flatten(dataclasses.asdict(made))
    here = settings.flatten(dataclasses.asdict(config))
    skips = "skip" in (config.train.on_nan, config.retrain.on_nan)
    free = [name for name in FREE if not (skips and name == "save_every")]
    return [
        f"{name} (there {there[name]!r}, now {value!r})"
        for name, value in here.items()
        if name not in free and there[name] != value
    ]
