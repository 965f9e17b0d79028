# SPDX-License-Identifier: Apache-2.0
"""Law 5, load . save = identity; and no damage and no kill goes unseen."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toygraphs
from flax import nnx

import jaxprune as jp
from jaxprune import checkpoint, integrity, models
from jaxprune.base import CheckpointError, ConfigError, GraphError
from jaxprune.pruned import Pruned

GRAPH = toygraphs.chain(4, 6)
KEEP = GRAPH.full() | {"l0": np.array([1, 0, 1, 1], bool)}


def small_network(**info) -> Pruned:
    variables = jp.shrink(GRAPH, KEEP, toygraphs.variables(GRAPH))
    apply = jp.slim(toygraphs.apply, GRAPH, KEEP)
    return Pruned(apply, variables, GRAPH, KEEP, info)


def assert_identical(a, b):
    """Same structure, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def state(seed=0):
    params = {
        "conv": {"kernel": jnp.arange(6.0).reshape(2, 3) + seed, "bias": jnp.ones(3)}
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"conv": {"kernel": True, "bias": False}}),
        optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
    )
    return {
        "params": params,
        "opt": tx.init(params),
        "key": jax.random.key(seed),
        "rbg": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "host": [
            np.int64(2**40 + seed),
            np.arange(3.0),
            np.float64(1e-300),
            7,
            True,
            0.1,
        ],
        "nothing": (None, jnp.zeros((0, 4), jnp.int8)),
        "dtypes": {
            name: jnp.asarray([0, 1, 1], name)
            for name in ("bfloat16", "float16", "int8", "uint32", "bool", "complex64")
        }
        | {"int4": jnp.array([-8, 7], jnp.int4), "f8": jnp.ones(5, jnp.float8_e4m3fn)},
    }


@pytest.fixture(scope="module")
def saved_network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "final"
    checkpoint.save(folder, small_network(note="x"), classes={"names": ["sky", "road"]})
    return folder


@pytest.fixture(scope="module")
def saved_steps(tmp_path_factory):
    store = checkpoint.open_store(tmp_path_factory.mktemp("store") / "train")
    for step in (10, 20):
        store.save(step, state(step), {"miou": step / 100, "next": [step, None]})
    return store.directory


# Training states.


def test_state_comes_back_as_it_was(saved_steps):
    store = checkpoint.open_store(saved_steps)
    tree, meta = store.restore(None, state())
    assert_identical(tree, state(20))
    assert meta == {"miou": 0.2, "next": [20, None], "step": 20} == store.meta(20)
    assert store.steps() == [10, 20] and store.latest() == 20
    assert_identical(store.restore(10, state())[0], state(10))


def test_state_comes_back_from_shapes_alone(tmp_path):
    store = checkpoint.open_store(tmp_path / "s")
    tree = {k: v for k, v in state(3).items() if k != "host"}
    store.save(0, tree)
    template = jax.eval_shape(lambda: {k: v for k, v in state().items() if k != "host"})
    again, _ = store.restore(0, template)
    assert_identical(again, tree)
    assert isinstance(again["opt"][1].inner_state[0], optax.ScaleByAdamState)
    assert isinstance(again["key"], jax.Array)


def test_numbers_take_the_form_of_the_template(tmp_path):
    store = checkpoint.open_store(tmp_path / "s")
    store.save(1, {"step": np.int64(5), "best": 0.25, "count": jnp.int32(3), "n": 4})
    template = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "best": np.float32(0),
        "count": 0,
        "n": np.zeros((), np.int16),
    }
    tree, _ = store.restore(1, template)
    wanted = {
        "step": jnp.int32(5),
        "best": np.float32(0.25),
        "count": 3,
        "n": np.array(4, np.int16),
    }
    assert_identical(tree, wanted)
    store.save(2, {"step": np.int64(2**40), "best": 0.25, "count": 3, "n": 4})
    with pytest.raises(CheckpointError, match="step: saved is 1099511627776"):
        store.restore(2, template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"a": {"b": jnp.ones(3), "c": jnp.ones(1)}}, "a/c of the template is not in"),
        ({}, "a/b of the checkpoint is not in the template"),
        ({"a": {"b": jnp.ones(4)}}, r"a/b: saved is float32\[3\].* has float32\[4\]"),
        ({"a": {"b": jnp.ones(3, jnp.int8)}}, r"a/b: saved is float32.* int8\[3\]"),
        ({"a": {"b": jax.random.key(0)}}, "a/b: saved is float32.* uint32.*fry"),
        ({"a": {"b": 1.0}}, r"a/b: saved is \[3\], the template has \[\]"),
        ({"a": [jnp.ones(3)]}, r"a/\[0\] of the template"),
    ],
)
def test_template_that_does_not_fit(tmp_path, template, message):
    store = checkpoint.open_store(tmp_path)
    store.save(1, {"a": {"b": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=message):
        store.restore(1, template)


@pytest.mark.parametrize(
    ("tree", "meta", "message"),
    [
        ({"a": {"b": "text"}}, {}, r"\['a'\]\['b'\]: a str can't be kept"),
        ({"a": np.array(["x"])}, {}, "a ndarray can't be kept"),
        ({(1, 2): jnp.ones(2)}, {}, "keys are strings or integers, not tuple"),
        ({}, {"f": print}, r"meta\['f'\] can't be kept as JSON"),
    ],
)
def test_what_cannot_be_kept_leaves_no_trace(tmp_path, tree, meta, message):
    store = checkpoint.open_store(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        store.save(1, tree, meta)
    assert store.steps() == [] and os.listdir(tmp_path) == []


def test_steps_kept(tmp_path):
    store = checkpoint.open_store(tmp_path / "s", keep_last=2, keep_best="miou")
    for step, miou in enumerate([0.1, 0.9, 0.3, float("nan"), 0.2]):
        store.save(step, {"x": jnp.ones(1)}, {"miou": miou})
    assert store.steps() == [1, 3, 4]
    every = checkpoint.open_store(tmp_path / "t", keep_last=None)
    for step in range(3):
        every.save(step, {}, {})
    assert every.steps() == [0, 1, 2]
    assert every.restore(2, {}) == ({}, {"step": 2})


def test_wrong_steps_and_folders(tmp_path, saved_steps):
    store = checkpoint.open_store(saved_steps)
    with pytest.raises(CheckpointError, match="no step 15; there are: 10, 20"):
        store.restore(15, state())
    with pytest.raises(CheckpointError, match="no step; there are: none"):
        checkpoint.open_store(tmp_path / "new").restore(None, state(), fallback=True)
    assert checkpoint.open_store(tmp_path / "new").latest() is None
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="is no whole number"):
        store.save(-1, {})
    with pytest.raises(CheckpointError, match="20: the step exists"):
        store.save(20, state(20))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.open_store(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.Store(tmp_path / "file" / "s").save(1, {})
    with pytest.raises(CheckpointError, match="keep_last = 0"):
        checkpoint.open_store(tmp_path, keep_last=0)


def test_a_step_is_replaced_if_forced_or_damaged(tmp_path):
    store = checkpoint.open_store(tmp_path)
    store.save(1, {"x": jnp.zeros(2)})
    store.save(1, {"x": jnp.ones(2)}, force=True)
    assert_identical(store.restore(1, {"x": jnp.ones(2)})[0], {"x": jnp.ones(2)})
    (tmp_path / "1" / "step.json").write_text("{}")
    store.save(1, {"x": jnp.full(2, 2.0)})
    assert_identical(store.restore(1, {"x": jnp.ones(2)})[0], {"x": jnp.full(2, 2.0)})
    assert os.listdir(tmp_path) == ["1"]


# Damage.


def damages(folder):
    """Each file: bits flipped at four places; cut; emptied; grown; gone."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        changed = [data + b"\0", None]
        if data:
            changed += [data[: len(data) // 2], data[:-1], b""]
        for at in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1} - {-1}):
            if data:
                flipped = bytes([data[at] ^ (1 << at % 7)])
                changed.append(data[:at] + flipped + data[at + 1 :])
        for new in changed:
            if new is None:
                file.unlink()
            else:
                file.write_bytes(new)
            yield file
            file.write_bytes(data)


def test_every_damage_of_a_network_is_named(saved_network, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved_network, folder)
    seen = set()
    for file in damages(folder):
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            checkpoint.load(folder, toygraphs.apply)
        seen.add(file.name)
    assert {"jaxprune.json", "graph.json", "manifest.sha256.json", "_METADATA"} <= seen
    checkpoint.load(folder, toygraphs.apply)


def test_every_damage_of_a_step_is_named_and_survived(saved_steps, tmp_path, caplog):
    shutil.copytree(saved_steps, tmp_path / "copy")
    store = checkpoint.open_store(tmp_path / "copy")
    like = state()
    for number, file in enumerate(damages(store.directory / "20")):
        message = re.escape(str(file)) + ".*; step 10 is intact"
        with pytest.raises(CheckpointError, match=message):
            store.restore(None, like)
        if number % 40 == 0:
            caplog.clear()
            tree, meta = store.restore(None, like, fallback=True)
            assert meta["step"] == 10 and str(file) in caplog.text
            assert_identical(tree, state(10))
    for step in (10, 20):
        (store.directory / str(step) / integrity.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no step before it is intact"):
        store.restore(None, like, fallback=True)


def test_a_file_too_many_is_named(saved_network, tmp_path):
    shutil.copytree(saved_network, tmp_path / "copy")
    (tmp_path / "copy" / "arrays" / "more").write_text("x")
    with pytest.raises(CheckpointError, match="arrays/more: not in the manifest"):
        checkpoint.load(tmp_path / "copy", toygraphs.apply)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "f"
    integrity.begin(folder)
    partial = integrity.sibling(folder, "partial")
    integrity.commit(partial, folder)
    manifest = integrity._manifest({name: [1, "0"]})
    (folder / integrity.MANIFEST).write_bytes(manifest)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        integrity.verify(folder)


# Kills.


class Killed(BaseException):
    pass


@pytest.mark.parametrize("replace", [False, True])
def test_death_at_any_moment_leaves_a_complete_state(tmp_path, monkeypatch, replace):
    """Die at the n-th change of the disk, for every n; nothing is cleaned up then."""
    like, calls = {"x": jnp.zeros(2)}, {"left": 0}

    def dying(f):
        @functools.wraps(f)
        def wrapped(*args, **kwargs):
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return f(*args, **kwargs)

        return wrapped

    step, deaths = (1 if replace else 2), 0
    for n in range(40):
        store = checkpoint.open_store(tmp_path / f"{replace}{n}", keep_last=1)
        store.save(1, {"x": jnp.ones(2)})
        with monkeypatch.context() as patch:
            calls["left"] = n
            for owner, name in [
                (Path, "rename"),
                (Path, "mkdir"),
                (Path, "write_text"),
                (shutil, "rmtree"),
                (integrity, "_seal"),
                (integrity, "_sync"),
                (integrity, "_digest"),
            ]:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                store.save(step, {"x": jnp.full(2, 2.0)}, force=True)
                done = True
            except Killed:
                done, deaths = False, deaths + 1
        tree, meta = store.restore(None, like)
        value = float(tree["x"][0])
        assert value in (1.0, 2.0) and (replace or meta["step"] == value)
        assert not done or value == 2.0
        store.save(3, {"x": jnp.full(2, 3.0)})
        assert sorted(os.listdir(store.directory)) == ["3"]
        if done:
            break
    assert done and deaths >= 8


WRITER = """
import sys, jax.numpy as jnp
from jaxprune import checkpoint
store = checkpoint.open_store(sys.argv[1])
step = (store.latest() or 0) + 1
while True:
    store.save(step, {"a": jnp.full((64, 64), step), "b": jnp.arange(9) + step})
    print(step, flush=True)
    step += 1
"""


def start(code, *args, **env):
    root = str(Path(checkpoint.__file__).parents[1])
    path = os.pathsep.join([root, str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_kill_leaves_the_latest_complete_step(tmp_path):
    store = checkpoint.open_store(tmp_path)
    like = {"a": jnp.zeros((64, 64), jnp.int32), "b": jnp.zeros(9, jnp.int32)}
    for delay in (0.004, 0.03):
        with start(WRITER, tmp_path) as process:
            reported = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        reported = int(rest[-1]) if rest else reported
        tree, meta = store.restore(None, like)
        assert meta["step"] in (reported, reported + 1)
        chex.assert_trees_all_equal(
            tree,
            {"a": jnp.full((64, 64), meta["step"]), "b": jnp.arange(9) + meta["step"]},
        )


# Networks.


def test_network_comes_back_as_it_was(saved_network):
    pruned = small_network()
    loaded = checkpoint.load(saved_network, toygraphs.apply)
    assert_identical(loaded.variables, pruned.variables)
    assert_identical(dict(loaded.keep), dict(pruned.keep))
    assert loaded.info == {"note": "x", "classes": {"names": ["sky", "road"]}}
    assert loaded.graph.terms == GRAPH.terms and list(loaded.graph.groups) == [
        "l0",
        "l1",
    ]
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(
        loaded.apply(loaded.variables, x), pruned.apply(pruned.variables, x)
    )
    card = checkpoint.read_card(saved_network)
    assert card.apply is card.variables is None and card.info == loaded.info


def test_saved_again_is_the_same(saved_network, tmp_path):
    loaded = checkpoint.load(saved_network, toygraphs.apply)
    checkpoint.save(tmp_path / "again", loaded)
    for name in ("jaxprune.json", "graph.json"):
        assert (tmp_path / "again" / name).read_bytes() == (
            saved_network / name
        ).read_bytes()


def test_shipped_network_needs_the_folder_alone(tmp_path):
    args = {"num_classes": 3, "widths": [4, 4, 4, 4]}
    net = models.build("segnet_basic", args)
    variables = models.init(net, jax.random.key(0), (16, 16))
    image = jnp.ones((1, 16, 16, 3))
    graph = jp.trace(net.apply, variables, image, train=False)
    name, group = list(graph.groups.items())[1]
    keep = graph.full() | {name: np.arange(group.size) != 2}
    small = jp.shrink(graph, keep, variables)
    apply = jp.slim(net.apply, graph, keep)
    network = {"name": "segnet_basic", "args": args}
    checkpoint.save(tmp_path / "f", Pruned(apply, small, graph, keep), network=network)
    loaded = checkpoint.load(tmp_path / "f")
    assert_identical(loaded.variables, small)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(loaded.apply, train=False))(loaded.variables, image),
        jax.jit(functools.partial(apply, train=False))(small, image),
    )


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (None, CheckpointError, "pass the dense function.*apply=model.apply"),
        ({"name": "x"}, CheckpointError, "is not {name, args}"),
        ({"name": "x", "args": {}}, ConfigError, "no network 'x'; choose one of"),
    ],
)
def test_network_that_cannot_be_built(tmp_path, network, error, message):
    checkpoint.save(tmp_path / "f", small_network(network=network))
    with pytest.raises(error, match=message):
        checkpoint.load(tmp_path / "f")


def test_odd_trees_of_variables(tmp_path):
    pruned = small_network()
    more = {
        "bf16": jnp.asarray([1, 2**-7], jnp.bfloat16),
        "../../escape": {"a/b": jnp.ones(1), "": jnp.ones(2), "é\0": np.arange(3)},
        "key": jax.random.key(3),
        "layers": {0: jnp.ones(2), 11: np.float64(1e-300)},
        "empty": {},
        "none": None,
    }
    tree = {**pruned.variables, "state": more}
    checkpoint.save(tmp_path / "a" / "f", pruned._replace(variables=tree))
    assert_identical(
        checkpoint.load(tmp_path / "a" / "f", toygraphs.apply).variables, tree
    )
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["f"]
    assert not [p for p in tmp_path.rglob("*") if "escape" in p.name]


def test_other_containers_need_like(tmp_path):
    pruned = small_network()
    tree = {**pruned.variables, "state": [jnp.ones(2), (jnp.zeros(1),)]}
    checkpoint.save(tmp_path / "f", pruned._replace(variables=tree))
    with pytest.raises(CheckpointError, match=r"state/\[0\] lies in .* pass like="):
        checkpoint.load(tmp_path / "f", toygraphs.apply)
    dense = {**toygraphs.variables(GRAPH), "state": [0, (0,)]}
    again = checkpoint.load(tmp_path / "f", toygraphs.apply, like=dense)
    assert_identical(again.variables, tree)


def test_nnx_state(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(nnx.relu(self.norm(self.layers[0](x)))))

    net = Net(nnx.Rngs(0))
    net.eval()
    definition, variables = nnx.split(net)

    def apply(state, x):
        return nnx.merge(definition, state)(x)

    x = jnp.ones((5, 3))
    graph = jp.trace(apply, variables, x)
    keep = {name: np.arange(g.size) != 1 for name, g in graph.groups.items()}
    assert keep
    pruned = Pruned(
        jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables), graph, keep
    )
    checkpoint.save(tmp_path / "f", pruned)
    loaded = checkpoint.load(tmp_path / "f", apply, like=nnx.split(Net(nnx.Rngs(1)))[1])
    assert_identical(loaded.variables, pruned.variables)
    np.testing.assert_array_equal(
        loaded.apply(loaded.variables, x), pruned.apply(pruned.variables, x)
    )
    plain = checkpoint.load(tmp_path / "f", apply).variables
    assert_identical(plain, nnx.to_pure_dict(pruned.variables))


def test_what_does_not_fit_is_not_saved(tmp_path):
    pruned = small_network()
    dense = toygraphs.variables(GRAPH)
    with pytest.raises(GraphError, match="l0"):
        checkpoint.save(tmp_path / "f", pruned._replace(variables=dense))
    with pytest.raises(GraphError, match="keep lacks group 'l0'"):
        checkpoint.save(tmp_path / "f", pruned._replace(keep={}))
    with pytest.raises(CheckpointError, match=r"info\['fn'\] can't be kept as JSON"):
        checkpoint.save(tmp_path / "f", pruned, fn=print)
    assert os.listdir(tmp_path) == []


def test_overwriting(tmp_path):
    folder = tmp_path / "f"
    checkpoint.save(folder, small_network(), note=1)
    with pytest.raises(
        CheckpointError, match="exists; choose another or pass overwrite"
    ):
        checkpoint.save(folder, small_network())
    checkpoint.save(folder, small_network(), overwrite=True, note=2)
    assert checkpoint.read_card(folder).info == {"note": 2}
    folder.rename(integrity.sibling(folder, "old"))  # died between the two renames
    assert checkpoint.read_card(folder).info == {"note": 2}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(
        CheckpointError, match="no saved network, so it is not overwritten"
    ):
        checkpoint.save(tmp_path / "home", small_network(), overwrite=True)


def test_wrong_folders(tmp_path, saved_steps):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"manifest.sha256.json: missing"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="jaxprune.json: missing.*something else"):
        checkpoint.load(saved_steps / "20")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "final").mkdir()
    with pytest.raises(CheckpointError, match="is a work folder; load .*final"):
        checkpoint.load(tmp_path)


def test_folder_of_another_version_or_form(tmp_path):
    folder = tmp_path / "f"
    checkpoint.save(folder, small_network())
    card = json.loads((folder / "jaxprune.json").read_text())
    leaf = card["leaves"][0]
    for change, message in [
        ({"version": 2}, "version 2 is unknown"),
        ({"keep": {"l0": "1111"}}, "keep lacks group 'l1'"),
        ({"keep": {"l0": "1111", "l1": "111111"}}, "l0"),
        ({"keep": 3}, "jaxprune.json: keep is not"),
        ({"keep": {"l0": 1}}, "jaxprune.json: keep is not"),
        ({"leaves": [{"path": 3}]}, r"jaxprune.json: leaves\[0\] = .* is malformed"),
        ({"leaves": [leaf | {"dtype": "x"}]}, r"leaves\[0\] = .* is malformed"),
        ({"leaves": {}}, "jaxprune.json: leaves is no list"),
        ({"leaves": [leaf]}, "arrays: Orbax cannot read it: User-provided"),
        ({"info": 3}, "jaxprune.json: info is no JSON object"),
    ]:
        (folder / "jaxprune.json").write_text(json.dumps(card | change))
        integrity._seal(folder)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder, toygraphs.apply)


# Devices and processes.

EIGHT = """
import sys, hashlib, json, pathlib, jax, jax.numpy as jnp, numpy as np, toygraphs
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxprune as jp
from jaxprune import checkpoint

folder = pathlib.Path(sys.argv[1])
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
here = checkpoint.load(folder / "one", toygraphs.apply)
pruned = checkpoint.load(folder / "one", toygraphs.apply, sharding=mesh)
for x, y in zip(jax.tree.leaves(here.variables), jax.tree.leaves(pruned.variables)):
    assert len(x.devices()) == 1 and len(y.devices()) == 8
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
checkpoint.save(folder / "eight", pruned)

split = NamedSharding(mesh, P("data"))
like = {"x": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=split),
        "key": jax.random.key(0)}
store = checkpoint.open_store(folder / "store")
tree, meta = store.restore(1, like)
assert tree["x"].sharding == split
store.save(2, tree)
print(json.dumps([hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
                  for x in jax.tree.leaves(pruned.variables)]))
"""


def test_one_device_and_eight(tmp_path):
    checkpoint.save(tmp_path / "one", small_network())
    store = checkpoint.open_store(tmp_path / "store")
    x = jax.random.normal(jax.random.key(1), (16, 3), jnp.bfloat16)
    tree = {"x": x, "key": jax.random.key(5)}
    store.save(1, tree)
    flags = "--xla_force_host_platform_device_count=8"
    with start(EIGHT, tmp_path, XLA_FLAGS=flags) as process:
        output = process.stdout.read()
    assert process.returncode == 0
    assert len(json.loads(output)) == 6
    assert_identical(store.restore(2, jax.eval_shape(lambda: tree))[0], tree)
    again = checkpoint.load(tmp_path / "eight", toygraphs.apply)
    assert_identical(again.variables, small_network().variables)


def test_wide_numbers_are_not_narrowed(tmp_path):
    pruned = small_network()
    with jax.enable_x64(True):
        wide = {**pruned.variables, "wide": {"x": jnp.float64(1e-300)}}
        checkpoint.save(tmp_path / "f", pruned._replace(variables=wide))
        again = checkpoint.load(tmp_path / "f", toygraphs.apply).variables
        assert_identical(again, wide)
    with pytest.raises(CheckpointError, match="wide/x is float64.*jax_enable_x64"):
        checkpoint.load(tmp_path / "f", toygraphs.apply)


def test_sharding_is_checked(saved_network):
    with pytest.raises(CheckpointError, match="neither a jax.sharding.Sharding nor"):
        checkpoint.load(saved_network, toygraphs.apply, sharding="data")


def test_orbax_is_imported_only_when_used():
    with start(
        "import sys, jaxprune.checkpoint; sys.exit('orbax' in sys.modules)"
    ) as p:
        p.communicate()
    assert p.returncode == 0
