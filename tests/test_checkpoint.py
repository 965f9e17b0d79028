# SPDX-License-Identifier: Apache-2.0
"""Law 5, load . save = identity; and no damage goes unseen."""

import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs
from flax import nnx
from saved import GRAPH, assert_identical, damages, small_network, start, state

import jaxprune as jp
from jaxprune import checkpoint, integrity, models
from jaxprune.base import CheckpointError, ConfigError, GraphError
from jaxprune.pruned import Pruned


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
        (None, CheckpointError, "dense function that was pruned.*apply=model.apply"),
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
    with pytest.raises(CheckpointError, match=r"not a dict: .*Pruned\(apply, variab"):
        checkpoint.save(tmp_path / "f", dense)
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


def test_what_others_wrote_is_never_overwritten(tmp_path):
    folder = tmp_path / "f"
    checkpoint.save(folder, small_network(), note=1)
    for name in ("notes.txt", "arrays/notes.txt"):
        (folder / name).write_text("mine")
        said = re.escape(f"{folder / name}: not jaxprune's, so nothing is overwritten")
        with pytest.raises(CheckpointError, match=said):
            checkpoint.save(folder, small_network(), overwrite=True)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    assert checkpoint.read_card(folder).info == {"note": 1}
    (folder / "graph.json").write_text("damaged")
    checkpoint.save(folder, small_network(), overwrite=True, note=2)
    assert checkpoint.read_card(folder).info == {"note": 2}
    (folder / integrity.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="whose files lie there is not known"):
        checkpoint.save(folder, small_network(), overwrite=True)


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
        ({"version": 2}, "version 2 is written by jaxprune"),
        ({"keep": {"l0": "1111"}}, "keep lacks group 'l1'"),
        ({"keep": {"l0": "1111", "l1": "111111"}}, "l0"),
        ({"keep": 3}, "jaxprune.json: keep is not"),
        ({"keep": {"l0": 1}}, "jaxprune.json: keep: group 'l0' is 1, not a text"),
        ({"leaves": [{"path": 3}]}, r"jaxprune.json: leaves\[0\] = .* is malformed"),
        ({"leaves": [leaf | {"dtype": "x"}]}, r"leaves\[0\] = .* is malformed"),
        ({"leaves": {}}, "jaxprune.json: leaves is no list"),
        ({"leaves": [leaf]}, "jaxprune.json: the tree lacks the leaf params/l"),
        ({"info": 3}, "jaxprune.json: info is no JSON object"),
    ]:
        (folder / "jaxprune.json").write_text(json.dumps(card | change))
        integrity._seal(folder)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder, toygraphs.apply)


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
other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
turned = NamedSharding(other, P("b"))
like["x"] = jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=turned)
again = store.restore(2, like)[0]["x"]
assert again.sharding == turned and len(again.addressable_shards) == 8
assert np.asarray(again).tobytes() == np.asarray(tree["x"]).tobytes()
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
