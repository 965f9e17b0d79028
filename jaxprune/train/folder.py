# SPDX-License-Identifier: Apache-2.0
"""The work folder: whose it is, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxprune.base import ConfigError
from jaxprune.train import config as configs
from jaxprune.train.config import Config

CONFIG = "config.json"


def check_free(config: Config, workdir: Path) -> None:
    """Raise ConfigError unless the folder is empty, new, or made by this config."""
    path = workdir / CONFIG
    if path.exists():
        configs.compare(config, path.read_text("utf-8"), str(workdir))
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(
            f"{workdir} is no work folder (no {CONFIG}), and not empty; choose another "
            "--workdir"
        )


def claim(config: Config, workdir: Path) -> None:
    """Make the folder this config's."""
    if not (workdir / CONFIG).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / CONFIG, configs.to_json(config))


def read_config(workdir: Path) -> Config:
    """The config that made a work folder; ConfigError where there is none."""
    try:
        return configs.from_json((workdir / CONFIG).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{workdir} is no work folder ({CONFIG}: {error.strerror}); give the "
            "--workdir of a 'jaxprune run'"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file all at once, from the first process."""
    if jax.process_index() == 0:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, "utf-8")
        os.replace(partial, path)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file all at once, from the first process."""
    write_text(path, json.dumps(document, indent=1) + "\n")
