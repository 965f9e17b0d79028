# SPDX-License-Identifier: Apache-2.0
"""`slim`: the function transformation that runs a network on shrunk variables.

The user's function is traced at its dense shapes; each equation is then run at the
sizes that the keep leaves. Nothing is traced at the new widths, so code that branches
on channel counts does what it did.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune import keeps, matching, trees
from jaxprune.base import (
    Apply,
    Graph,
    GraphError,
    Keep,
    PyTree,
    check_function,
    key_path,
    path_str,
)
from jaxprune.labels import Value
from jaxprune.plan import plan
from jaxprune.rules import RULES
from jaxprune.trace import abstract_inputs, is_arraylike, state_outputs, struct
from jaxprune.walk import Kept, Tape, run, take

_PLANS = 16


def slim(apply: Apply, graph: Graph, keep: Keep) -> Apply:
    """Transform `apply` so that it takes variables shrunk by `keep`.

        slim(apply, graph, keep)(shrink(graph, keep, v), x) == apply(mask(graph, keep,
        v), x)

    The result takes what apply takes: other batch and image sizes, train mode, mutable
    collections, rngs; under jit, grad, vmap, remat and scan. Custom derivatives are
    kept. Arguments that are not arrays are static, and apply is traced once for each
    set of shapes and static arguments, as `jax.jit` does: it must be pure. Raises
    GraphError for variables that do not have the shrunk shapes, and where another mode
    of the function ties a removed channel to one that stays.
    """
    check_function(apply)
    keep = keeps.check_keep(graph, keep, concrete=True)
    if all(k.all() for k in keep.values()):
        return apply
    kept = matching.kept_indices(graph, keep)
    leaves = graph.leaves
    inexact = _inexact(graph, keep)
    plans: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    @functools.wraps(apply)
    def slimmed(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(variables)
        arrays = [x for _, x in flat]
        abstract, rebuild = abstract_inputs((inputs, kwargs))
        given = [x for x in jax.tree.leaves((inputs, kwargs)) if is_arraylike(x)]
        key = _key((inputs, kwargs), arrays, treedef)
        if key is not None and key in plans:
            plans.move_to_end(key)
            return plans[key](arrays, given)
        structs, order = _dense_structs(graph, kept, flat)

        def dense(flat_variables: list[Any], flat_inputs: list[Any]) -> Any:
            args, more = rebuild(flat_inputs)
            return apply(jax.tree.unflatten(treedef, flat_variables), *args, **more)

        name = getattr(apply, "__name__", "apply")
        cuts = [kept[number] for number in order]
        program, out = jx.trace(dense, structs, abstract)
        states = [None if s is None else kept[s] for s in state_outputs(out, leaves)]
        loose = None if inexact is None else [inexact.get(n, {}) for n in order]
        paths = [path_str(graph.leaves[number].path) for number in order]
        tape, resolve = _plan(program, cuts, states, name, paths, loose)
        runner = functools.partial(_run, tape, resolve, jax.tree.structure(out))
        reusable = not any(isinstance(c, jax.core.Tracer) for c in program.consts)
        if key is not None and reusable:
            plans[key] = runner
            while len(plans) > _PLANS:
                plans.popitem(last=False)
        return runner(arrays, given)

    return slimmed


def verify(
    apply: Apply,
    graph: Graph,
    keep: Keep,
    variables: PyTree,
    *inputs: Any,
    **kwargs: Any,
) -> float:
    """The largest relative error of slim's law on this input, over all outputs.

    variables are the dense ones. For each output, max |slim - masked| / max |masked|;
    inf where one of the two is not finite and the other is not the same.
    """
    check_function(apply)
    masked = apply(trees.mask(graph, keep, variables), *inputs, **kwargs)
    small = trees.shrink(graph, keep, variables)
    cut = slim(apply, graph, keep)(small, *inputs, **kwargs)
    worst = 0.0
    masked = _cut_state(graph, keep, masked)
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(cut), strict=True):
        if jx.is_array(a) and np.size(a):
            worst = max(worst, relative_error(np.asarray(a), np.asarray(b)))
    return worst


def relative_error(want: np.ndarray, got: np.ndarray) -> float:
    """max |want - got| / max |want|; inf where one is not finite and the other is."""
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    want, got = want.astype(wide), got.astype(wide)
    numbers = np.isfinite(want)
    if not np.array_equal(want[~numbers], got[~numbers], equal_nan=True):
        return np.inf
    want, got = want[numbers], got[numbers]
    if not np.isfinite(got).all():
        return np.inf
    scale = np.max(np.abs(want), initial=0.0) or 1.0
    return float(np.max(np.abs(want - got), initial=0.0) / scale)


def _cut_state(graph: Graph, keep: Keep, out: PyTree) -> PyTree:
    """Updated variables among the masked function's outputs, cut as slim's are."""
    flat, treedef = jax.tree.flatten(out)
    kept = matching.kept_indices(graph, keep)
    for i, number in enumerate(state_outputs(out, graph.leaves)):
        if number is not None:
            flat[i] = take(flat[i], kept[number])
    return jax.tree.unflatten(treedef, flat)


def _key(arguments: Any, arrays: Sequence[Any], treedef: Any) -> Any:
    """What a plan depends on; None where an argument cannot be hashed.

    None for symbolic shapes, too: symbols of two scopes look alike, and do not mix.
    """
    flat, tree = jax.tree.flatten(arguments)
    shapes = [x.shape for x in flat if is_arraylike(x)]
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return None
    static = tuple(str(struct(x)) if is_arraylike(x) else (type(x), x) for x in flat)
    key = (treedef, tree, static, tuple(map(_kind, arrays)), jx.context())
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _inexact(graph: Graph, keep: Keep) -> dict[int, dict[int, np.ndarray]] | None:
    """By leaf and axis, indices of groups that are not exact; None if none is cut."""
    numbers = {leaf.path: i for i, leaf in enumerate(graph.leaves)}
    found: dict[int, dict[int, np.ndarray]] = {}
    for name, group in graph.groups.items():
        for slot in () if group.exact or keep[name].all() else group.slots:
            number = numbers[slot.path]
            length = graph.leaves[number].shape[slot.axis]
            mine = found.setdefault(number, {})
            mine.setdefault(slot.axis, np.zeros(length, bool))[slot.indices] = True
    return found or None


def _kind(x: Any) -> tuple[Any, ...]:
    found = struct(x)
    return found.shape, found.dtype, found.weak_type, found.sharding


def _dense_structs(
    graph: Graph, kept: Sequence[Kept], flat: Sequence[tuple[Any, Any]]
) -> tuple[list[jax.ShapeDtypeStruct], list[int]]:
    """The dense shapes of shrunk variables, checked, and each one's leaf number."""
    numbers = {leaf.path: i for i, leaf in enumerate(graph.leaves)}
    order: list[int] = []
    structs = []
    for keys, x in flat:
        path = key_path(keys)
        number = numbers.get(path)
        if number is None:
            raise GraphError(f"variables hold {path_str(path)}, which the graph lacks")
        order.append(number)
        leaf, x = graph.leaves[number], struct(x)
        small = matching.cut_shape(leaf, kept[number])
        if tuple(x.shape) != small:
            hint = "pass jaxprune.shrink(graph, keep, variables)"
            if tuple(x.shape) != leaf.shape:
                hint = (
                    "were they cut by another keep? After a second cut, slim with "
                    "jaxprune.compose(first keep, second keep)"
                )
            raise GraphError(
                f"{path_str(path)} has shape {tuple(x.shape)}, shrunk it is {small} "
                f"(dense {leaf.shape}); {hint}"
            )
        structs.append(x.update(shape=leaf.shape))
    given = set(order)
    for i, leaf in enumerate(graph.leaves):
        if i not in given:
            raise GraphError(f"variables lack {path_str(leaf.path)} {leaf.shape}")
    return structs, order


def _plan(
    program: jx.Program,
    cuts: Sequence[Kept],
    states: Sequence[Kept | None],
    name: str,
    paths: Sequence[str],
    inexact: Sequence[Mapping[int, np.ndarray]] | None,
) -> tuple[Tape, Callable[[Value], Kept]]:
    """Analyse with the keep at variables and updated variables; all else whole."""
    rest = program.invars[len(cuts) :]
    kept_in = [*cuts, *((None,) * len(v.aval.shape) for v in rest)]
    fills: list[tuple[float | None, ...]] = [(0.0,) * len(k) for k in cuts]
    fills += [(None,) * len(v.aval.shape) for v in rest]
    kept_out = [
        (None,) * len(var.aval.shape) if state is None else state
        for var, state in zip(program.outvars, states)
    ]
    inexact_in = None
    if inexact is not None:
        inexact_in = {
            (i, axis): inexact[i].get(axis, np.zeros(n, bool))
            for i, var in enumerate(program.invars[: len(cuts)])
            for axis, n in enumerate(var.aval.shape)
        }
    return plan(
        program,
        kept_in,
        kept_out,
        fills,
        RULES,
        name,
        exact=inexact is None,
        inexact_in=inexact_in,
        inputs=paths,
    )


def _run(
    tape: Tape,
    resolve: Callable[[Value], Kept],
    out: Any,
    arrays: Sequence[Any],
    given: Sequence[Any],
) -> Any:
    flat = run(tape, resolve, RULES, [*map(jnp.asarray, arrays), *given])
    return jax.tree.unflatten(out, flat)
