# SPDX-License-Identifier: Apache-2.0
"""Numbers out of the ordinary: complex, of 64 bits, tiny, or nearly equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.base import BudgetError, ConfigError, DataError, GraphError
from jaxprune.criteria import stateless
from jaxprune.layerwise import check_readers
from jaxprune.train import metrics, study

RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def apply(variables: Any, x: Any) -> Any:
    return jax.nn.relu(x @ variables["a"]) @ variables["b"]


def net(width: int = 6) -> tuple[Any, Any, str]:
    """(variables, graph, the name of its one group)."""
    variables = {"a": normal(4, width), "b": normal(width, 3)}
    graph = jp.trace(apply, variables, normal(2, 4))
    (name,) = graph.groups
    return variables, graph, name


def test_a_kernel_that_is_read_in_two_ways_is_not_refitted() -> None:
    """A square one makes the channels and reads them; another one is refitted alone."""
    variables = {"w": normal(6, 6), "head": normal(6, 3)}
    x = normal(40, 6)

    def tied(variables: Any, x: Any) -> Any:
        hidden = jax.nn.relu(x @ variables["w"])
        return jnp.einsum("bh,ih->bi", hidden, variables["w"]) @ variables["head"]

    graph = jp.trace(tied, variables, x)
    (name,) = (n for n, g in graph.groups.items() if g.slots[0].path == ("w",))
    keep = graph.full()
    keep[name][0] = False
    with pytest.raises(GraphError, match="other products read along other axes"):
        jp.reconstruct(tied, graph, keep, variables, [x])
    with pytest.raises(GraphError, match="nothing reads"):
        check_readers(tied, graph, variables, x, jp.flops(0.7))

    def both(variables: Any, x: Any) -> Any:
        hidden = jax.nn.relu(x @ variables["w"])
        more = jnp.einsum("bh,ih->bi", hidden, variables["w"])
        return jnp.concatenate([more, hidden @ variables["head"]], axis=1)

    graph = jp.trace(both, variables, x)
    keep = {n: np.arange(g.size) > 0 for n, g in graph.groups.items()}
    masked = jp.mask(graph, keep, variables)
    fitted = jp.reconstruct(both, graph, keep, variables, [x], positions=None)
    np.testing.assert_array_equal(fitted["w"], masked["w"])
    hidden = jax.nn.relu(x @ masked["w"])
    lost = np.mean(
        (hidden @ fitted["head"] - jax.nn.relu(x @ variables["w"]) @ variables["head"])
        ** 2
    )
    before = np.mean((both(masked, x) - both(variables, x))[:, 6:] ** 2)
    assert lost < before


def test_small_features_are_refitted_as_large_ones() -> None:
    variables, graph, name = net()
    x = normal(60, 4)
    keep = {name: np.arange(6) > 1}
    found = [
        jp.reconstruct(apply, graph, keep, variables, [x * np.float32(s)], ridge=0.0)
        for s in (1.0, 1e-7)
    ]
    np.testing.assert_allclose(found[1]["b"], found[0]["b"], rtol=1e-3, atol=1e-4)


def test_layers_are_chosen_the_same_in_64_bits() -> None:
    variables, graph, name = net()
    x = normal(30, 4)
    keep, _ = jp.lasso_select(apply, graph, variables, [x], jp.flops(0.5))
    with jax.enable_x64(True):
        again, _ = jp.lasso_select(apply, graph, variables, [x], jp.flops(0.5))
    np.testing.assert_array_equal(again[name], keep[name])


def test_a_cost_of_ones_own_is_steered_to_in_64_bits() -> None:
    variables, graph, _ = net()

    class Own:
        def at(self, groups: Any, kept: Any) -> Any:
            return jnp.asarray(kept) @ np.ones(len(groups))

    with jax.enable_x64(True):
        tx = jp.proximal(graph, jp.steer(graph, 0.5, kind=Own()))  # type: ignore
        state = tx.init(variables)
        none = jax.tree.map(jnp.zeros_like, variables)
        _, after = tx.update(none, state, variables)
        assert all(
            a.dtype == b.dtype
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True)
        )
        assert all(g.dtype == jnp.float32 for g in jp.init_gates(graph).values())


def test_complex_weights_are_measured_by_their_size() -> None:
    variables, graph, name = net()
    phases = jax.tree.map(lambda x: np.exp(1j * RNG.normal(size=x.shape)), variables)
    turned = jax.tree.map(lambda x, p: (x * p).astype(np.complex64), variables, phases)
    for place in (lambda x: x, jnp.asarray):  # by NumPy, and compiled
        for p in (1, 2):
            found = jp.score(jp.magnitude(p), graph, jax.tree.map(place, turned))
            want = jp.score(jp.magnitude(p), graph, variables)
            np.testing.assert_allclose(found[name], want[name], rtol=1e-5)
    ema = jp.chain(jp.magnitude(2), jp.ema(0.5))
    found, want = (jp.score(ema, graph, v)[name] for v in (turned, variables))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    penalty = jp.group_lasso(graph, turned)
    np.testing.assert_allclose(penalty, jp.group_lasso(graph, variables), rtol=1e-5)
    tx = jp.proximal(graph, 0.1)
    none = jax.tree.map(jnp.zeros_like, turned)
    updates, _ = tx.update(none, tx.init(turned), turned)
    after = optax.apply_updates(turned, updates)
    plain = jax.tree.map(jnp.zeros_like, variables)
    updates, _ = tx.update(plain, tx.init(variables), variables)
    want = optax.apply_updates(variables, updates)
    for key in ("a", "b"):
        np.testing.assert_allclose(after[key], want[key] * phases[key], atol=1e-5)
    x, keep = normal(9, 4), {name: np.arange(6) > 0}
    with pytest.raises(GraphError, match="complex"):
        jp.reconstruct(apply, graph, keep, turned, [x])
    with pytest.raises(GraphError, match="factorize: a is complex"):
        jp.factorize(apply, graph, turned, x, ratio=0.9)
    with pytest.raises(GraphError, match="a is complex"):
        jp.prune_weights(apply, turned, x, budget=jp.flops(0.5))
    with pytest.raises(GraphError, match=f"group '{name}': the scores are complex"):
        jp.select(graph, {name: np.ones(6) * 1j}, jp.flops(0.5))


def test_complex_weights_are_scored_by_what_the_loss_and_the_readers_lose() -> None:
    """Against derivatives by the channels' sizes, and NumPy in complex128."""
    turned = {"a": normal(4, 6) + 1j * normal(4, 6), "b": normal(6, 3) + 1j}
    x, y = normal(16, 4), normal(16, 3)

    def linear(v: Any, x: Any) -> Any:
        return jnp.real(x @ v["a"] @ v["b"])

    def loss(v: Any, batch: Any) -> Any:
        return jnp.mean((linear(v, batch[0]) - batch[1]) ** 2)

    def sized(t: Any, x: Any, y: Any) -> Any:
        return loss({"a": turned["a"], "b": turned["b"] * t[:, None]}, (x, y))

    graph = jp.trace(linear, turned, x)
    (name,) = graph.groups

    def scores(criterion: Any) -> Any:
        given = {"loss": loss, "batches": [(x, y)], "key": jax.random.key(0)}
        return jp.score(criterion, graph, turned, **given)[name]

    slope = jax.grad(sized)(jnp.ones(6), x, y)
    found = scores(jp.taylor(1, roles=("in",)))
    np.testing.assert_allclose(found, np.abs(slope), rtol=1e-4)
    each = jax.vmap(jax.grad(sized), (None, 0, 0))(jnp.ones(6), x[:, None], y[:, None])
    found = scores(jp.fisher(roles=("in",)))
    np.testing.assert_allclose(found, (each**2).mean(0) / 2, rtol=1e-4)
    h = np.complex128(x) @ np.complex128(turned["a"])
    np.testing.assert_allclose(scores(jp.activation("std")), h.std(axis=0), rtol=1e-4)
    z = h[:, :, None] * np.complex128(turned["b"])
    lost = (abs(z) ** 2).sum(axis=(0, 2)) / (abs(z.sum(axis=1)) ** 2).sum()
    found = scores(jp.reconstruction_error(positions=16))
    np.testing.assert_allclose(found, lost, rtol=1e-4)
    apart = np.complex128(turned["a"])[:, :, None] - turned["a"][:, None]
    median = np.sqrt((abs(apart) ** 2).sum(axis=0)).sum(axis=1)
    np.testing.assert_allclose(scores(jp.geometric_median()), median, rtol=1e-4)


def test_complex_weights_shrink_in_the_metric_of_adam() -> None:
    """As real ones of their sizes do: phases stay."""
    variables, graph, name = net()
    phases = jax.tree.map(lambda x: np.exp(1j * RNG.normal(size=x.shape)), variables)
    turned = jax.tree.map(lambda x, p: (x * p).astype(np.complex64), variables, phases)

    def after(v: Any) -> Any:
        tx = jp.preconditioned(optax.adam(0.1), graph, 0.5, steps=jp.adam_steps())
        updates, _ = tx.update(v, tx.init(v), v)
        return optax.apply_updates(v, updates)

    found, want = after(turned), after(variables)
    assert 0 < jp.dead(graph, want)[name].sum()
    for key in ("a", "b"):
        np.testing.assert_allclose(abs(found[key]), abs(want[key]), atol=1e-5)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_distances_of_nearly_equal_channels_do_not_cancel(spread: float) -> None:
    variables, graph, name = net(32)
    own = normal(4, 1) + np.float32(spread) * normal(4, 32)
    variables["a"] = np.float32(own)
    found = jp.score(jp.geometric_median(), graph, variables)[name]
    rows = np.float64(variables["a"]).T
    want = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(axis=1)
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_without_a_part_in_the_cost_nothing_is_penalised() -> None:
    def free(variables: Any, x: Any) -> Any:
        hidden = jnp.tanh(x[:, :1] * variables["scale"])
        return x @ variables["c"] + hidden.sum(axis=-1, keepdims=True)

    variables = {"scale": normal(8), "c": normal(4, 3)}
    graph = jp.trace(free, variables, normal(2, 4))
    for weights in jp.flops_weights(graph).values():
        np.testing.assert_array_equal(weights, 0)


def test_numbers_of_numpy_and_python_are_taken() -> None:
    variables, graph, name = net()
    scores = {name: np.arange(6.0)}
    keep = jp.select(graph, scores, jp.flops(0.5), min_channels=np.int64(2))
    assert keep[name].sum() == 3

    def scaled(variables: Any, x: Any) -> Any:
        return variables["by"] * apply(variables, x)

    more = {**variables, "by": 2.0}
    graph = jp.trace(scaled, more, normal(2, 4))
    assert all(k.all() for k in jp.dead(graph, more).values())


def test_what_has_no_meaning_is_said() -> None:
    variables, graph, name = net()
    with pytest.raises(ConfigError, match="even_start: total=0"):
        jp.steering.even_start(graph, {name: np.ones(6)}, 0.5, 0)
    with pytest.raises(GraphError, match=rf"gates of group '{name}' are \(\)"):
        jp.gates_to_keep({name: np.float32(0)})
    tx = optax.masked(jp.proximal(graph, 0.1), {"a": True, "b": False})
    with pytest.raises(GraphError, match="lacks the leaf b .*optax.masked"):
        tx.update(variables, tx.init(variables), variables)


def test_labels_of_any_integers_are_counted() -> None:
    logits = jax.nn.one_hot(np.arange(20), 20)
    found = metrics.confusion(logits, np.arange(20, dtype=np.uint8), 255)
    np.testing.assert_array_equal(found, np.eye(20))


@pytest.mark.parametrize("budget", [0.25, 1 / 3, 1e-5, np.float64(0.12)])
def test_the_folder_of_a_run_tells_its_budget(budget: float) -> None:
    named = study._NAME.fullmatch(study._name("path", budget, 3))
    assert named is not None
    assert (named[1], float(named[2]), named[3]) == ("path", budget, "3")
    assert study._name("l1", 0.25, 0) == "l1-0.25-seed0"
    for other in (
        "l1-0.25-seed0 copy",
        "l1-0.2-0.5-seed0",
        "l11-0.5-seed0",
        "l1-seed0",
    ):
        assert study._NAME.fullmatch(other) is None


def test_a_walk_by_measured_losses_compiles_the_loss_once() -> None:
    variables, graph, _ = net()
    traced = []

    def loss(variables: Any, x: Any) -> Any:
        traced.append(x)
        return jnp.mean(apply(variables, x) ** 2)

    criterion = jp.magnitude()
    batches = [normal(5, 4), normal(5, 4)]
    jp.prune_path(
        graph, variables, loss, batches, criterion=criterion, measured=True, block=0
    )
    assert len(traced) == 1


def test_an_update_that_returns_scores_alone() -> None:
    variables, graph, name = net()
    alone = jp.Criterion(lambda *_: (), lambda scores, *_: scores)
    wrapped = stateless(lambda scores, evidence: {name: np.arange(6.0)})
    np.testing.assert_equal(jp.score(wrapped, graph, variables)[name], np.arange(6.0))
    for criterion in (alone, jp.chain(jp.magnitude(), alone)):
        with pytest.raises(ConfigError, match=r"scores\}, state\), this one dict"):
            jp.score(criterion, graph, variables)


def _stepped(tx: Any) -> Any:
    def update(updates: Any, params: Any) -> None:
        tx.update(updates, tx.init(params), params)

    return update


def test_slips_of_the_hand_are_told() -> None:
    variables, graph, name = net()
    x, gates = normal(2, 4), jp.init_gates(graph)
    both = {"net": variables, "gates": gates}
    zeros = jax.tree.map(jnp.zeros_like, both)
    sgd = optax.sgd(0.1)
    within = jp.preconditioned_gates(
        sgd, 0.1, steps=lambda state, params: params, key="gate"
    )
    uncalled = jp.preconditioned(sgd, graph, 0.1, steps=jp.adam_steps)
    scores = [np.ones(6)]
    for error, words, call in (
        (ConfigError, "gates within other params", _stepped(jp.proximal_gates(0.1))),
        (ConfigError, "the gates alone", _stepped(jp.accelerated_gates(0.1))),
        (ConfigError, "no 'gate'; key= is the name of the gates", _stepped(within)),
        (ConfigError, "call it: steps=adam_steps", _stepped(uncalled)),
        (GraphError, "scores=", lambda: jp.select(graph, scores, jp.flops(0.5))),
        (GraphError, "scores=None", lambda: jp.adaptive(graph, None)),
        (
            ConfigError,
            "overrides=",
            lambda: jp.select(
                graph, {name: np.ones(6)}, jp.flops(0.9), overrides=[name]
            ),
        ),
        (
            DataError,
            "reconstruct needs batches",
            lambda: jp.reconstruct(apply, graph, graph.full(), variables, None),
        ),
        (
            ConfigError,
            "ratio='0.5'",
            lambda: jp.factorize(apply, graph, variables, x, ratio="0.5"),
        ),
        (BudgetError, "target='0.5'", lambda: jp.steer(graph, "0.5")),
        (
            BudgetError,
            "no kernel can be factorised by 'cp'",
            lambda: jp.factorize(
                apply, graph, variables, x, method="cp", budget=jp.flops(0.5)
            ),
        ),
    ):
        with pytest.raises(error, match=words):
            call(zeros, both) if call.__name__ == "update" else call()
