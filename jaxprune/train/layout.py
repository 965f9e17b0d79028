# SPDX-License-Identifier: Apache-2.0
"""How a training state lies over the mesh, by shardings alone.

'none': every device holds the whole state, and a part of the batch. 'fsdp': every
device holds its share of the parameters, of their average and of the optimiser's state
(ZeRO, Rajbhandari et al., 2020, stage 3; Xu et al., "Automatic cross-replica sharding
of weight update in data-parallel training", 2020, for how a compiler does it).
Parameters are put together for the step that uses them, and gradients leave it in
shares, which the optimiser updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.base import PyTree

Shard = Literal["none", "fsdp"]


class Layout(NamedTuple):
    """A mesh of one axis, and what of a state is split over it."""

    mesh: Mesh
    shard: Shard = "none"


def shardings(layout: Layout, tree: PyTree) -> PyTree:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of a state.

    With 'fsdp' the largest axis that the mesh divides is split, the first of equals;
    where there is none, and with 'none', each device holds the whole leaf.
    """
    return jax.tree.map(
        lambda x: NamedSharding(layout.mesh, _spec(layout, np.shape(x))), tree
    )


def _spec(layout: Layout, shape: Sequence[int]) -> PartitionSpec:
    size = layout.mesh.size
    fits = [a for a, n in enumerate(shape) if n and n % size == 0]
    if layout.shard == "none" or size == 1 or not fits:
        return PartitionSpec()
    axis = max(fits, key=lambda a: shape[a])
    return PartitionSpec(*[None] * axis, *layout.mesh.axis_names)


def put(layout: Layout, tree: PyTree) -> PyTree:
    """Arrays of any kind where the layout has them; each process calls it."""
    return jax.device_put(tree, shardings(layout, tree))


def owned(layout: Layout, tree: PyTree) -> PyTree:
    """As `put`, in memory of its own, which a step may take over."""
    places = shardings(layout, tree)
    copy = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=places)
    return copy(jax.device_put(tree, places))


# Under jit.


def whole(layout: Layout | None, tree: PyTree) -> PyTree:
    """The tree put together on every device, for what computes with it."""
    if layout is None or layout.shard == "none":
        return tree
    place = NamedSharding(layout.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: place, tree))


def split(layout: Layout | None, tree: PyTree) -> PyTree:
    """The tree in shares, such as gradients for an optimiser's.

    What it is computed from stays as it lies: shares that reached back to it would cost
    an all-gather for each activation that is computed from it, too.
    """
    if layout is None or layout.shard == "none":
        return tree
    tree = whole(layout, tree)
    return jax.lax.with_sharding_constraint(tree, shardings(layout, tree))


def parts(layout: Layout | None, batch: PyTree, count: int) -> PyTree:
    """Arrays [B, ...] as [count, B / count, ...], of every count-th row.

    So each device finds its share of each part among its own rows.
    """

    def cut(x: Any) -> Any:
        x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
        if layout is None:
            return x
        place = NamedSharding(layout.mesh, PartitionSpec(None, *layout.mesh.axis_names))
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(cut, batch)


# Between stages.


def settled(tree: PyTree) -> PyTree:
    """What every device holds whole in NumPy, what lies in shares as it is."""

    def host(x: Any) -> Any:
        shared = isinstance(x, jax.Array) and not x.is_fully_replicated
        return x if shared else np.asarray(x)

    return jax.tree.map(host, tree)


def on_one_device(tree: PyTree) -> PyTree:
    """The tree on a device of this process; of shares, all processes call it."""

    def here(x: Any) -> Any:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            place = NamedSharding(x.sharding.mesh, PartitionSpec())
            x = jax.jit(lambda y: y, out_shardings=place)(x).addressable_data(0)
        return jax.device_put(x, jax.local_devices()[0])

    return jax.tree.map(here, tree)
