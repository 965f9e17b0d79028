# SPDX-License-Identifier: Apache-2.0
"""Walks that are stopped and go on, walks that retrain, and what their files hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs

import jaxprune as jp
from jaxprune import path_io
from jaxprune.base import BudgetError, DataError, GraphError
from jaxprune.measures import random, taylor
from jaxprune.path import prune_path
from jaxprune.steps import Path

GRAPH = toygraphs.chain(8, 6)
VARIABLES = toygraphs.variables(GRAPH)
RNG = np.random.default_rng(0)
BATCH = (
    RNG.normal(size=(8, 3)).astype(np.float32),
    RNG.normal(size=(8, 2)).astype(np.float32),
)


def squares(variables, batch):
    x, y = batch
    return jnp.mean((toygraphs.apply(variables, x) - y) ** 2, axis=-1)


def loss(variables, batch):
    return jnp.mean(squares(variables, batch))


def risk(variables, batch):
    """Risks, all of which count, and two sums: of integers and of floats."""
    found = squares(variables, batch)
    sums = {"worse": jnp.sum(found > 1, keepdims=True), "total": jnp.sum(found)}
    return found, jnp.ones(8, bool), sums


def walk(file=None, **options):
    options = {"criterion": random(), "key": jax.random.key(3), "block": 0.1} | options
    return prune_path(
        GRAPH, VARIABLES, loss, [BATCH, BATCH], risk=risk, file=file, **options
    )


def assert_same(one, two):
    assert len(one.steps) == len(two.steps)
    for a, b in zip(one.steps, two.steps, strict=True):
        for name in GRAPH.groups:
            np.testing.assert_array_equal(a.keep[name], b.keep[name])
        assert a._replace(keep=None, sums=None) == b._replace(keep=None, sums=None)
        for name in a.sums:
            np.testing.assert_array_equal(a.sums[name], b.sums[name])


@jax.jit
def descend(variables):
    slope = jax.grad(loss)(variables, BATCH)
    return jax.tree.map(lambda x, g: x - 0.05 * g, variables, slope)


def retrained(step, variables):
    """Ten steps of gradients, of removed channels too: the walk must mask them."""
    del step
    for _ in range(10):
        variables = descend(variables)
    return jax.tree.map(lambda x: x + 1e-3, variables)


@pytest.mark.parametrize("recover", [None, retrained], ids=["plain", "recover"])
def test_a_stopped_walk_goes_on_to_the_same_path(tmp_path, recover):
    whole, file = walk(recover=recover, block=0.15), tmp_path / "folder" / "walk.jsonl"
    assert len(whole.steps) > 5
    for killed in (1, 4):  # behind so many steps in all

        def stop(step, killed=killed):
            if len(Path.load(file).steps) == killed:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            walk(file, recover=recover, block=0.15, on_step=stop)
        with open(file, "a") as stream:
            stream.write('12345678 {"alpha": 0.1, "ri')  # a line cut short by the kill
    seen = []
    found = walk(file, recover=recover, block=0.15, on_step=seen.append)
    assert_same(found, whole)
    assert_same(Path.load(file), whole)
    assert len(seen) == len(whole.steps) - 4
    if recover is None:  # a walk that has ended is read, not walked
        assert_same(walk(file, block=0.15, on_step=pytest.fail), whole)


def test_a_walk_of_an_older_jaxprune_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "walk.jsonl"
    with monkeypatch.context() as older:
        older.setattr(jp, "__version__", "0.0.9")
        whole = walk(file)
    assert '"jaxprune": "0.0.9"' in file.read_text()
    assert_same(walk(file, on_step=pytest.fail), whole)


def test_draws_go_by_the_number_of_the_step():
    one, two = walk(block=0).steps[1:3]
    options = {"criterion": random(), "key": jax.random.key(3), "block": 0}
    fixed = prune_path(GRAPH, VARIABLES, loss, [BATCH], **options).steps
    for step, again in zip((one, two), fixed[1:]):
        assert all((step.keep[n] == again.keep[n]).all() for n in GRAPH.groups)
    # The unit that goes first has the least draw per FLOP under the first step's key.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 1), 2)
    l0, l1 = (np.asarray(jax.random.uniform(k, (n,))) for k, n in zip(keys, (8, 6)))
    if l0.min() / (3 + 6) < l1.min() / (8 + 2):
        assert not one.keep["l0"][l0.argmin()]
    else:
        assert not one.keep["l1"][l1.argmin()]


def test_another_walk_and_damage_are_named(tmp_path):
    file = tmp_path / "walk.jsonl"
    walk(file, until=None)
    for options, name in (
        ({"block": 0.2}, "block .there 0.1, now 0.2."),
        ({"until": jp.flops(0.5)}, "until"),
        ({"key": jax.random.key(4)}, "key"),
        ({"multiple_of": 2}, "widths"),
        ({"measured": True}, "measured"),
        ({"kind": "params"}, "kind"),
    ):
        with pytest.raises(DataError, match=f"another walk: .*{name}"):
            walk(file, **options)
    kept, more = tmp_path / "more.jsonl", {"a": 1, "b": 2}
    path_io.write(kept, (), more)
    for now, said in (
        ({"a": 1}, "b .there 2, now not given."),
        ({**more, "c": None}, "c .there not given, now None."),
    ):
        with pytest.raises(DataError, match=f"another walk: {said}; set this back"):
            path_io.resume(kept, now)
    path_io.write(kept, ())
    with pytest.raises(DataError, match="another walk: it does not tell of which"):
        path_io.resume(kept, {})
    other = jax.tree.map(lambda x: x + 1, VARIABLES)
    with pytest.raises(DataError, match="another walk: variables"):
        prune_path(
            GRAPH,
            other,
            loss,
            [BATCH, BATCH],
            file=file,
            block=0.1,
            key=jax.random.key(3),
            criterion=random(),
        )
    lines = file.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("risk", "rusk")
    file.write_text("".join(lines))
    with pytest.raises(DataError, match=r"walk.jsonl.*checksum of line 3"):
        walk(file)
    (tmp_path / "none").write_text("")
    for name, words in (("missing", "No such file"), ("none", "no pruning path")):
        with pytest.raises(DataError, match=words):
            Path.load(tmp_path / name)


def test_a_path_is_saved_and_loaded(tmp_path):
    path = walk()
    path.save(tmp_path / "a.path")
    assert_same(Path.load(tmp_path / "a.path"), path)
    assert_same(Path.from_json(path.to_json()), path)
    values = np.asarray(squares(VARIABLES, BATCH), np.float64)
    assert path.steps[0].counted == 16
    assert path.steps[0].sums["worse"] == 2 * np.sum(values > 1)
    assert path.steps[0].sums["worse"].dtype == np.int64
    assert path.steps[0].sums["total"] == pytest.approx(2 * values.sum(), rel=1e-5)


def test_recovery_lowers_the_risk_and_leaves_zeros_zero(tmp_path):
    given = []

    def recover(step, variables):
        given.append((step, variables))
        return retrained(step, variables)

    file = tmp_path / "walk.jsonl"
    path = walk(file, recover=recover, criterion=taylor(), key=None)
    assert len(given) == len(path.steps) - 1  # the dense network is as it was
    # What the reference does: cut by hand, as the path cuts, and retrain.
    variables = VARIABLES
    for number, (step, (before, seen)) in enumerate(zip(path.steps[1:], given), 1):
        masked = jp.mask(GRAPH, step.keep, variables)
        jax.tree.map(np.testing.assert_array_equal, seen, masked)
        assert before.risk == pytest.approx(float(loss(masked, BATCH)), rel=1e-5)
        variables = jp.mask(GRAPH, step.keep, retrained(None, masked))
        assert step.risk == pytest.approx(float(loss(variables, BATCH)), rel=1e-5)
        assert step.risk < before.risk
        small = path_io.load_variables(GRAPH, file, number, step, VARIABLES)
        jax.tree.map(
            np.testing.assert_array_equal, small, jp.shrink(GRAPH, step.keep, variables)
        )
    (tmp_path / "walk.jsonl.2.npz").write_bytes(b"PK torn")
    with pytest.raises(DataError, match="walk.jsonl.2.npz: the variables of step 2"):
        path_io.load_variables(GRAPH, file, 2, path.steps[2], VARIABLES)


def test_what_recover_returns_must_fit():
    with pytest.raises(GraphError, match="recover must return the variables"):
        walk(recover=lambda step, variables: jp.shrink(GRAPH, step.keep, variables))


def test_variables_of_all_dtypes_come_back(tmp_path):
    kernel = ("params", "l1", "kernel")
    tree = jax.tree.map(lambda x: x, VARIABLES)
    tree["params"]["l1"]["kernel"] = tree["params"]["l1"]["kernel"].astype(jnp.bfloat16)
    tree["params"]["l0"]["bias"] = np.arange(8)
    tree["rng"] = jax.random.key(5, impl="rbg")
    step = walk().steps[3]
    path_io.save_variables(GRAPH, tmp_path / "w", 3, step, tree)
    found = path_io.load_variables(GRAPH, tmp_path / "w", 3, step, tree)
    small = jp.shrink(GRAPH, step.keep, tree)
    assert found["params"]["l1"][kernel[-1]].dtype == jnp.bfloat16
    assert jax.random.bits(found.pop("rng")) == jax.random.bits(small.pop("rng"))
    jax.tree.map(np.testing.assert_array_equal, found, small)


def untouched(variables, batch):
    raise AssertionError("nothing must be evaluated")


def test_a_budget_out_of_reach_is_refused_before_the_walk():
    # Four of 8 and of 6 channels stay at the least: 2 (3 4 + 4 4 + 4 2) of 168 FLOPs.
    with pytest.raises(BudgetError, match=r"flops\(0\.2\).*0\.4286") as caught:
        prune_path(
            GRAPH, VARIABLES, untouched, [BATCH], until=jp.flops(0.2), multiple_of=4
        )
    assert "multiple_of" in str(caught.value)
    path = walk(until=jp.flops(0.4286), multiple_of=4)
    assert path.steps[-1].cost.flops == 72


def test_a_dense_network_without_a_risk_is_refused():
    with pytest.raises(DataError, match="risk of the dense network is nan"):
        prune_path(
            GRAPH, VARIABLES, loss, [BATCH], risk=lambda v, b: loss(v, b) + jnp.nan
        )


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_steps_whose_risk_is_not_finite_are_walked_but_never_chosen(value):
    def spoilt(variables, batch):
        gone = jnp.sum(variables["params"]["l0"]["bias"] == 0)
        return squares(variables, batch) + jnp.where(gone > 3, value, 0.0)

    path = prune_path(GRAPH, VARIABLES, loss, [BATCH], risk=spoilt, block=0.1)
    finite = [np.isfinite(s.risk) for s in path.steps]
    assert finite[0] and not finite[-1]
    assert path.steps[-1].keep["l0"].sum() == 1  # down to the end
    for rule in ("min", "1se", "knee"):
        assert np.isfinite(path.select(rule).risk)


def test_one_image_has_no_standard_error():
    one = jax.tree.map(lambda x: x[:1], BATCH)
    path = prune_path(GRAPH, VARIABLES, loss, [one], risk=squares, until=jp.flops(0.9))
    assert path.steps[0].counted == 1 and np.isnan(path.steps[0].stderr)
    with pytest.raises(DataError, match="1 counted"):
        path.select("1se")
