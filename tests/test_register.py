# SPDX-License-Identifier: Apache-2.0
"""Rules of one's own: the documented example runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import rules

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"


@pytest.fixture
def table():
    """The rule table, put back as it was afterwards."""
    before = dict(rules.RULES)
    yield rules.RULES
    rules.RULES.clear()
    rules.RULES.update(before)


def example() -> dict:
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "register_rule" in block)
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def network(bias_relu):
    """dense -> bias and relu by the kernel -> dense."""

    def apply(p, x):
        hidden = x @ p["one"]["kernel"]
        bias = jnp.broadcast_to(p["one"]["bias"], hidden.shape)
        return bias_relu(hidden, bias) @ p["two"]["kernel"]

    one, two, bias = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(3, 8), (8, 2), (8,)])
    )
    return apply, {"one": {"kernel": one, "bias": bias}, "two": {"kernel": two}}


def test_the_documented_kernel_is_pruned_exactly(table):
    bias_relu = example()["bias_relu"]
    apply, variables = network(bias_relu)
    x = jax.random.normal(jax.random.key(9), (5, 3))

    graph = jp.trace(apply, variables, x)

    assert [(g.name, g.size) for g in graph.groups.values()] == [("one", 8)]
    keep = {"one": np.arange(8) % 3 != 0}
    assert jp.verify(apply, graph, keep, variables, x) < 1e-6
    small = jp.slim(apply, graph, keep)(jp.shrink(graph, keep, variables), x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    hidden = np.maximum(np.asarray(x) @ p["one"]["kernel"] + p["one"]["bias"], 0)
    want = (hidden * keep["one"]) @ p["two"]["kernel"]
    np.testing.assert_allclose(small, want, rtol=1e-5, atol=1e-5)


def test_other_kernels_stay_frozen_by_name(table):
    example()
    pl = pytest.importorskip("jax.experimental.pallas")

    def copy(x, out):
        out[...] = x[...]

    def other(x, b):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(copy, out_shape=out, name="copy", interpret=True)(x) + b

    apply, variables = network(other)
    graph = jp.trace(apply, variables, jnp.ones((5, 3)))
    assert not graph.groups
    assert any("pallas_call" in f.cause for f in graph.frozen)


def test_a_rule_is_not_replaced_unasked(table):
    old, mine = table["tanh"], rules.Rule(lambda *a: None, lambda cut: None)
    with pytest.raises(jp.base.GraphError, match="tanh has a rule already"):
        jp.register_rule("tanh", mine)
    assert jp.register_rule(jax.lax.tanh_p, mine, replace=True) is old
    assert table["tanh"] is mine


def test_a_reshape_of_ones_own_is_asked_inside_of_shuffles_too(table):
    def apply(p, x):
        hidden = (x @ p["one"]).reshape(-1, 2, 4).swapaxes(1, 2).reshape(-1, 8)
        return hidden @ p["two"]

    p = {"one": jnp.ones((3, 8)), "two": jnp.ones((8, 2))}
    old, seen = table["reshape"], []

    def asked(context, eqn, ins):
        seen.append(eqn)
        return old.analyse(context, eqn, ins)

    jp.trace(apply, p, jnp.ones((5, 3)))
    assert not seen
    jp.register_rule("reshape", old._replace(analyse=asked), replace=True)
    jp.trace(apply, p, jnp.ones((5, 3)))
    assert len(seen) >= 2
