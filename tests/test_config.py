# SPDX-License-Identifier: Apache-2.0
"""Configs: overrides, checks before any work, and the JSON of a work folder."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinyrun

from jaxprune import data
from jaxprune.base import ConfigError
from jaxprune.train import config as configs
from jaxprune.train import folder
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Data, Fit, Network, Prune

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
HEAD = "from jaxprune import data, train\n"


def write(tmp_path: Path, body: str, head: str = HEAD) -> Path:
    path = tmp_path / "some.py"
    path.write_text(head + body)
    return path


@pytest.fixture
def empty(tmp_path) -> Path:
    return write(tmp_path, "def get_config():\n    return train.Config()\n")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=3", "seed", 3),
        ("prune.ratio=0.4", "prune.ratio", 0.4),
        ("prune.ratio=1", "prune.ratio", 1.0),
        ("train.epochs=1e1", "train.epochs", 10.0),
        ("prune.per_cost=yes", "prune.per_cost", True),
        ("scratch=false", "scratch", False),
        ("data.root=/a b", "data.root", "/a b"),
        ("data.root=none", "data.root", None),
        ("data.size=120x160", "data.size", (120, 160)),
        ("data.size=(120, 160)", "data.size", (120, 160)),
        ("data.stored=240,320", "data.stored", (240, 320)),
        ("data.augment.scale=0.5,2", "data.augment.scale", (0.5, 2.0)),
        ("network.widths=8,16,32,64,64", "network.widths", (8, 16, 32, 64, 64)),
        ("network.widths=", "network.widths", ()),
        ("prune.method=path", "prune.method", "path"),
        ("prune.method=svd", "prune.method", "svd"),
        ("prune.multiple_of=auto", "prune.multiple_of", "auto"),
        ("prune.multiple_of=4", "prune.multiple_of", 4),
    ],
)
def test_overrides_take_the_fields_type(empty, override, field, value):
    found = configs.settings.get(configs.load_config(empty, [override]), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prune.ration=0.4", ("prune", "'ration'", "did you mean 'ratio'?")),
        ("trian.epochs=3", ("'trian'", "did you mean 'train'?")),
        ("zzz=3", ("'zzz'", "name, seed")),
        ("prune=3", ("prune.(", "ratio")),
        ("seed.a=3", ("seed has no field 'a'",)),
        ("seed", ("FIELD=VALUE",)),
        ("seed=x", ("seed = x", "a whole number")),
        ("seed=1.5", ("seed = 1.5", "a whole number")),
        ("scratch=perhaps", ("scratch = perhaps", "true or false")),
        ("data.size=120", ("data.size = 120", "2 numbers")),
        ("prune.method=magic", ("prune.method = magic", "'lasso'", "'svd'")),
        ("prune.multiple_of=some", ("prune.multiple_of = some", "'auto'")),
        ("prune.ratio=0", ("prune.ratio = 0", "(0, 1]")),
        ("prune.ratio=1.01", ("prune.ratio = 1.01", "(0, 1]")),
        ("prune.ratio=nan", ("prune.ratio = nan", "finite number")),
        ("train.epochs=-1", ("train.epochs = -1", "0 or more")),
        ("retrain.batch=0", ("retrain.batch = 0", "from 1 to")),
        ("retrain.ema=1", ("retrain.ema = 1", "[0, 1)")),
        ("train.warmup=1000", ("train.warmup = 1000", "epochs")),
        ("distill.weight=2", ("distill.weight = 2", "[0, 1]")),
        ("evaluate.every=0", ("evaluate.every = 0", "positive")),
        ("data.size=0x10", ("data.size", "positive")),
        ("retrain.augment=-1", ("retrain.augment = -1", "0 or more")),
        ("data.augment.colour=2", ("data.augment.colour = 2", "[0, 1]")),
        ("data.augment.crop=8x8", ("data.augment.crop", "data.size decides")),
        ("network.widths=8,0", ("network.widths", "from 1 to")),
        ("name=a/b", ("name = 'a/b'", "file's name")),
        ("prune.weights=flop", ("prune.weights = flop", "'latency'")),
        ("prune.target=1.5", ("prune.target = 1.5", "in [0, 1]")),
        ("prune.gates_lr=0", ("prune.gates_lr = 0", "positive")),
        ("prune.cuts_in_training=-1", ("prune.cuts_in_training = -1", "0 or more")),
    ],
)
def test_bad_overrides_are_named(empty, override, parts):
    with pytest.raises(ConfigError) as caught:
        configs.load_config(empty, [override])
    assert [part for part in parts if part not in str(caught.value)] == []


def test_no_more_colour_than_there_is(empty):
    with pytest.raises(ConfigError, match=r"retrain.augment = 2.*1 / data.augment"):
        configs.load_config(empty, ["data.augment.colour=0.6", "retrain.augment=2"])


def test_gates_carry_no_optimiser(empty):
    for setting, match in (
        ("prune.budget=channels", "prune.budget = 'channels': must be flops or params"),
        ("scratch=true", "scratch = True: must be false where the method is 'weights'"),
        ("prune.reconstruct=1", "prune.reconstruct = 1: must be 0 where"),
    ):
        with pytest.raises(ConfigError, match=match):
            configs.load_config(empty, ["prune.method=weights", setting])
    with pytest.raises(ConfigError, match="prune.reconstruct = 0: .*'layerwise'"):
        configs.load_config(empty, ["prune.method=layerwise"])
    with pytest.raises(ConfigError, match="prune.stages = 9: must be at most prune"):
        more = ["prune.method=particles", "prune.trials=8", "prune.stages=9"]
        configs.load_config(empty, more)
    few = ["prune.method=random_masks", "prune.trials=4"]
    assert configs.load_config(empty, few).prune.trials == 4
    with pytest.raises(ConfigError, match="carry_optimizer = True.*false.*'gates'"):
        configs.load_config(empty, ["prune.method=gates", "prune.carry_optimizer=true"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [
                "prune.method=gates",
                "prune.metric=optimizer",
                "prune.accelerated=true",
            ],
            "metric.*gates are accelerated",
        ),
        (
            ["prune.metric=optimizer"],
            "metric.*trains under no penalty",
        ),
        (
            [
                "prune.method=lasso",
                "train.optimizer=sgd",
                "prune.metric=optimizer",
            ],
            "metric.*is not 'adam'",
        ),
        (["prune.method=lasso", "prune.accelerated=true"], "accelerated.*not 'gates'"),
        (["prune.method=path", "prune.target=0.4"], "target = 0.4: must be 0 where"),
        (["prune.cuts_in_training=2"], "cuts_in_training = 2: must be 0 where"),
        (["prune.roles=out"], "roles = 'out': must be 'both' where"),
        (
            ["prune.method=gates", "prune.roles=in"],
            "roles = 'in': must be 'both' where",
        ),
        (["prune.ramp=2.0"], "ramp = 2.0: must be from 0 to prune.lasso_epochs, and 0"),
        (
            ["prune.method=lasso", "prune.ramp=2.0", "prune.target=0.4"],
            "ramp = 2.0: must be 0 where prune.target steers",
        ),
        (["prune.repriced=true"], "repriced = True: must be false where"),
        (
            ["prune.method=gates", "prune.accelerated=true", "prune.strength=0"]
            + ["prune.target=0.4"],
            "strength = 0.*: must be positive with a target where",
        ),
        (["prune.choose=1se"], "choose = '1se': must be 'budget' where"),
        (["prune.estimate=fisher"], "estimate = 'fisher': must be 'taylor' where"),
        (["prune.method=path", "prune.scope=local"], "scope = 'local': must be 'glo"),
        (["prune.method=path", "prune.per_cost=yes"], "per_cost = True: must be fa"),
        (["prune.adaptive=1"], "adaptive = 1.*: must be 0 where"),
        (["prune.method=lasso", "prune.adaptive=-1"], "adaptive = -1.*in .0, 4."),
    ],
)
def test_penalties_that_cannot_be(empty, overrides, words):
    with pytest.raises(ConfigError, match=words):
        configs.load_config(empty, overrides)


def test_another_optimiser_carries_none_on(empty):
    other = ["retrain.optimizer=sgd", "prune.carry_optimizer=true"]
    with pytest.raises(ConfigError, match="carry_optimizer = True.*false.*differ"):
        configs.load_config(empty, other)
    assert configs.load_config(empty, [*other, "train.optimizer=sgd"])


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("x = 1\n", ("get_config()",)),
        ("def get_config():\n    return 3\n", ("get_config()", "train.Config")),
        ("def get_config(:\n", ("SyntaxError",)),
        (
            "def get_config():\n    return train.Fit(epoch=3)\n",
            ("Fit", "'epoch'", "did you mean 'epochs'?"),
        ),
        (
            "def get_config():\n    return train.Config(prune=train.Prune('Path'))\n",
            ("prune.method = 'Path'", "'path'"),
        ),
        (
            "def get_config():\n    return train.Config(data=train.Fit())\n",
            ("data = ", "must be a Data"),
        ),
        (
            "def get_config():\n    return train.Config(seed='3')\n",
            ("seed = '3'", "a whole number"),
        ),
        (
            "def get_config():\n    data.Augment(colour=3)\n",
            ("colour", "[0, 1]"),
        ),
        ("def get_config():\n    return train.Confg()\n", ("Confg",)),
    ],
)
def test_bad_files_are_named(tmp_path, body, parts):
    path = write(tmp_path, body)
    with pytest.raises(ConfigError) as caught:
        configs.load_config(path)
    assert str(path) in str(caught.value) or parts[0] in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.py: no such config file"):
        configs.load_config(tmp_path / "none.py")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = configs.load_config(path)
    assert config.name == path.stem
    assert configs.from_json(configs.to_json(config)) == config
    text = path.read_text()
    assert f"jaxprune run configs/{path.name}" in text
    assert "Hardware" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_settings_that_shipped_configs_suggest_can_be_trained(path):
    suggested = re.findall(r"--set (\S+=\S+)", path.read_text())
    config = configs.load_config(path, suggested)
    for fit in (config.train, config.retrain):
        _, rate = steps.optimizer(fit, 10)
        assert max(rate(n) for n in range(10)) > 0.8 * fit.lr


def test_differences_list_only_what_was_changed():
    config = Config(prune=Prune(ratio=0.5), data=Data(augment=data.Augment(flip=False)))
    found = configs.differences(config)
    assert found == {"prune.ratio": 0.5, "data.augment.flip": False}
    assert configs.differences(config, config) == {}


def test_json_is_whole_and_missing_fields_have_defaults():
    config = Config("x", network=Network(widths=(4, 8)), train=Fit(epochs=3))
    assert configs.from_json(configs.to_json(config)) == config
    assert configs.from_json('{"seed": 4}') == Config(seed=4)


def test_a_work_folder_belongs_to_its_config(tmp_path):
    config, workdir = Config(seed=1), tmp_path / "run"
    folder.check_free(config, workdir)
    with folder.claim(config, workdir):
        pass
    folder.check_free(config, workdir)
    assert folder.read_config(workdir) == config
    # What changes no result may differ.
    free = dataclasses.replace(config, save_every=7.0)
    folder.check_free(free, workdir)
    other = dataclasses.replace(config, seed=2, prune=Prune(ratio=0.5))
    with pytest.raises(ConfigError) as caught:
        folder.check_free(other, workdir)
    with pytest.raises(ConfigError, match="another config"):
        with folder.claim(other, workdir):
            pass
    message = str(caught.value)
    assert "seed (there 1, now 2)" in message
    assert "prune.ratio (there 0.25, now 0.5)" in message
    assert "--workdir" in message and "save_every" not in message


HOLD = """
import sys
from pathlib import Path
from jaxprune.train import folder
from jaxprune.train.config import Config

with folder.claim(Config(), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_work_folder_is_one_runs_at_a_time(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(workdir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as caught:
            with folder.claim(Config(), workdir):
                pass
        assert f"{workdir}: another run is using it" in str(caught.value)
        other.kill()  # even so the folder is free again
    with folder.claim(Config(), workdir):
        pass


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("val", lambda s: {"images": np.where(s.images == 7, np.uint8(8), s.images)}),
        ("train", lambda s: {"labels": 2 - s.labels.clip(0, 2)}),
        ("test", lambda s: {"stems": s.stems[::-1]}),
        ("val", lambda s: {"classes": data.Classes(("c", "b", "a"), s.classes.colors)}),
    ],
    ids=["images", "labels", "stems", "classes"],
)
def test_other_data_are_refused_on_resuming(tmp_path, name, change):
    splits = {n: tinyrun.split(n, 4) for n in ("train", "val", "test")}
    folder.check_data(list(splits.values()), tmp_path)
    folder.check_data(list(splits.values()), tmp_path)
    other = dataclasses.replace(splits[name], **change(splits[name]))
    with pytest.raises(ConfigError) as caught:
        folder.check_data(list({**splits, name: other}.values()), tmp_path)
    assert f"the split '{name}' is not what" in str(caught.value)
    assert "data.root" in str(caught.value) and "data.json" in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.claim(Config(), tmp_path / "run"):
        assert folder.read_config(tmp_path / "run") == Config()


def test_a_work_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=f"{workdir} cannot be made .*--workdir"):
        with folder.claim(Config(), workdir):
            pass


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"sede": 1})])
def test_a_damaged_config_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        folder.check_free(Config(), tmp_path)


def test_a_folder_with_other_things_is_not_worked_in(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        folder.check_free(Config(), tmp_path)
    with pytest.raises(ConfigError, match="no work folder"):
        folder.read_config(tmp_path)
