# SPDX-License-Identifier: Apache-2.0
"""How strong the penalty is: a number, a schedule, or a controller with a target.

A proximal step knows for each channel the strength at which it dies. So a controller
can tell, before it is applied, what a strength would leave, and stop at the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budget
from jaxprune.base import BudgetError, ConfigError, Graph
from jaxprune.pricing import live_cost

Deaths = Mapping[str, Any]
Schedule = Callable[[Any], Any]
_BITS = 31  # of a float32 that is not negative
_BAND = 0.05  # off the plan by so much of it, lambda changes as fast as it may


class ProximalState(NamedTuple):
    """`steps`: int32 scalar, the updates so far."""

    steps: jax.Array


class SteeredState(NamedTuple):
    """Of a proximal step that is steered; arrays, so that checkpoints hold them.

    steps: int32 scalar, the updates so far. level: float32 scalar, lambda as it is now.
    cost: float32 scalar, the fraction of the dense cost that is live.
    """

    steps: jax.Array
    level: jax.Array
    cost: jax.Array


class Steering(NamedTuple):
    """A controller, as `steer` makes it; pass it as a `strength`.

    init() -> state. update(state, deaths) -> (strength, state), where deaths {group:
    float[C]} are the strengths at which channels die. check(mortal), mortal {group:
    bool or bool[C]}, raises BudgetError for a target that is out of reach where the
    others cannot die.
    """

    init: Callable[[], SteeredState]
    update: Callable[[SteeredState, Deaths], tuple[Any, SteeredState]]
    check: Callable[[Mapping[str, Any]], None] = lambda mortal: None


Strength = float | Schedule | Steering


def steer(
    graph: Graph,
    target: float | Schedule,
    *,
    kind: budget.Kind = "flops",
    rate: float | Schedule = 1.0,
    start: float = 1e-3,
    gain: float = 0.02,
) -> Steering:
    """Find lambda while training, so that a fraction of the dense cost stays live.

    At step t, with the live cost c (a fraction of the dense one) and the plan r(t),

        strength(t) = min(rate(t) lambda(t), the least that brings the cost to r(t))
        lambda(t+1) = lambda(t) exp(gain clip(20 (c / r(t) - 1), -f, 1))

    The second line is an integral controller of log lambda, which alone would
    overshoot: norms take many steps to fall, and what is dead stays dead. The first
    one lands: from the moment at which the plan is met the strength is 0, and the last
    channels to die are no more than are needed, found by bisection. So the cost ends at
    r, or below it by less than a channel costs (more where channels die together), and
    is held: should channels revive, the penalty is back. For that f is 1 while the plan
    falls and 0 from then on: a strength of 0 is no sign that lambda is too large, and a
    lambda that fell meanwhile would take hundreds of steps to come back. All of it is a
    few operations on the norms, in the jitted step; nothing leaves the device.

    Args:
      graph: of the dense network, also where a part of it has been cut already.
      target: r, a fraction of the dense cost; a number, or a schedule of the step, such
        as optax.linear_schedule(1.0, 0.4, 2000), for a cost that falls by degrees.
      kind: as of a budget; measured milliseconds too.
      rate: the optimiser's learning rate, or schedule of it; over 1 - mu where it has
        momentum, see `proximal`.
      start: lambda at first; it stays within a factor of 10^6 of that.
      gain: the largest relative change of lambda in a step, 5 % off the plan.

    Raises BudgetError for a target that is not in (0, 1], or below what one channel a
    group costs; so does the proximal step that it is given to, where weights of 0, or
    groups of which nothing is trained, leave it out of reach. ConfigError for a start
    or a gain that is not positive.
    """
    for name, value in (("start", start), ("gain", gain)):
        if not value > 0:
            raise ConfigError(f"steer: {name}={value!r}: must be positive")
    if isinstance(target, budget.Budget):
        raise BudgetError(
            f"steer: target={target!r}: say its ratio and its kind, steer(graph, "
            f"{target.ratio}, kind={target.kind!r:.40})"
        )
    if not callable(target):
        check_target(graph, target, kind)
    cost = live_cost(graph, kind)

    def update(state: SteeredState, deaths: Deaths) -> tuple[Any, SteeredState]:
        steps = state.steps
        plan: Any = target
        ahead: Any = target
        if callable(target):
            plan, ahead = target(steps), target(_next(steps))
        falls = jnp.where(jnp.asarray(ahead) < plan, 1.0, 0.0)

        after = _behind(cost, deaths)
        wanted = state.level * (rate(steps) if callable(rate) else rate)
        # Above the strength that leaves nothing there is nothing to look for.
        wanted = jnp.minimum(wanted, 1.01 * _last(deaths))
        strength = _landing(after, wanted, plan)
        live = after(strength)
        change = jnp.exp(gain * jnp.clip((live / plan - 1) / _BAND, -falls, 1))
        level = jnp.clip(state.level * change, 1e-6 * start, 1e6 * start)
        return strength, SteeredState(_next(steps), jnp.float32(level), live)

    def init() -> SteeredState:
        one, level = jnp.ones((), jnp.float32), jnp.float32(start)
        return SteeredState(jnp.zeros((), jnp.int32), level, one)

    def check(mortal: Mapping[str, Any]) -> None:
        if not callable(target):
            check_target(graph, target, kind, mortal)

    return Steering(init, update, check)


def even_start(
    graph: Graph,
    deaths: Deaths,
    target: float,
    total: float,
    kind: budget.Kind = "flops",
) -> float:
    """A lambda to start from: it reaches the target by degrees, if nothing resists.

    Each proximal step takes as much off the norms, so that a channel has died when the
    strengths add up to what would kill it at once.

    Args:
      deaths: {group: float[C]}, the strengths at which the channels die now; see
        `jaxprune.sparsity.deaths`.
      target, kind: as of `steer`.
      total: the sum of such rates by when the target is to be met.

    Raises what `steer` does, and ConfigError for a total that is not positive.
    """
    if not total > 0:
        raise ConfigError(f"even_start: total={total!r}: must be positive")
    check_target(graph, target, kind)
    after = _behind(live_cost(graph, kind), deaths)
    least = _landing(after, 1.01 * _last(deaths), target)
    return float(least) / total


def begun(strength: Strength) -> ProximalState | SteeredState:
    """The state before the first step."""
    if isinstance(strength, Steering):
        return strength.init()
    return ProximalState(jnp.zeros((), jnp.int32))


def stepped(
    strength: Strength, state: Any, deaths: Callable[[], Deaths]
) -> tuple[Any, Any]:
    """(the strength of this step, the state behind it)."""
    if isinstance(strength, Steering):
        return strength.update(state, deaths())
    now = strength(state.steps) if callable(strength) else strength
    return now, ProximalState(_next(state.steps))


def deaths_of(sizes: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """{group: float[C]}: size / weight; infinite where there is no penalty."""
    found = {}
    for name, size in sizes.items():
        weight = jnp.broadcast_to(jnp.asarray(weights[name], size.dtype), size.shape)
        ratio = size / jnp.where(weight > 0, weight, 1)
        found[name] = jnp.where(weight > 0, ratio, jnp.inf)
    return found


def check_strength(strength: Strength) -> None:
    """Raises ConfigError for a number that is negative, or none."""
    if callable(strength) or isinstance(strength, Steering | jax.core.Tracer):
        return
    number = np.asarray(strength)
    known = number.ndim == 0 and jnp.issubdtype(number.dtype, jnp.number)
    if not known or not number >= 0:
        raise ConfigError(f"strength={strength!r}: one number, not negative")


def checked_steps(each: Any) -> Any:
    """What `steps(state, params)` returned; ConfigError for a function."""
    if callable(each):
        raise ConfigError("steps= returned a function; call it: steps=adam_steps()")
    return each


def _next(steps: jax.Array) -> jax.Array:
    return jnp.where(steps < jnp.iinfo(steps.dtype).max, steps + 1, steps)


def _behind(cost: Callable[[Any], jax.Array], deaths: Deaths) -> Callable[..., Any]:
    """strength -> the cost of what it leaves."""
    return lambda s: cost({n: _count(jnp.asarray(d) > s) for n, d in deaths.items()})


def _count(alive: jax.Array) -> jax.Array:
    """Live channels of a group, which is never emptied."""
    return jnp.maximum(jnp.sum(alive), 1)


def _last(deaths: Deaths) -> jax.Array:
    """The largest strength at which a channel dies, of those that can."""
    ends = [jnp.max(jnp.where(jnp.isfinite(d), d, 0)) for d in deaths.values()]
    return jnp.max(jnp.stack([jnp.zeros(()), *ends]))


def _landing(after: Callable[[Any], jax.Array], wanted: Any, plan: Any) -> jax.Array:
    """The least strength up to `wanted` that brings the cost to the plan, or `wanted`.

    `after` falls in steps; the plan forgives what float32 rounds. Bisection halves the
    bits, not the number: strengths at which channels die may lie decades apart.
    """
    plan = plan * (1 + 1e-6)

    def halved(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends
        middle = low + (high - low) // 2
        met = after(_as(middle, jnp.float32)) <= plan
        return jnp.where(met, low, middle), jnp.where(met, middle, high)

    wanted = jnp.asarray(wanted, jnp.float32)
    bits = _as(wanted, jnp.int32)
    _, least = jax.lax.fori_loop(0, _BITS, halved, (jnp.zeros_like(bits), bits))
    # So that what dies by this comparison also does by the proximal step's rounding.
    least = jnp.minimum(_as(least, jnp.float32) * (1 + 1e-6), wanted)
    return jnp.where(after(jnp.zeros(())) <= plan, 0.0, least)


_as = jax.lax.bitcast_convert_type


def check_target(
    graph: Graph,
    target: float,
    kind: budget.Kind,
    mortal: Mapping[str, Any] | None = None,
) -> None:
    """Raises BudgetError for a target that is no fraction, or cannot be reached.

    mortal: {group: bool or bool[C]}, which channels can die; all by default.
    """
    if not isinstance(target, int | float | np.number) or not 0 < target <= 1:
        raise BudgetError(
            f"steer: target={target!r}: the fraction of the dense cost that stays live,"
            " in (0, 1]"
        )
    counts = {}
    for name, group in graph.groups.items():
        can = (mortal or {}).get(name, True)
        stay = np.sum(np.logical_not(can)) if np.ndim(can) else group.size * (not can)
        counts[name] = max(int(stay), 1)
    held = [n for n, c in counts.items() if c > 1]
    with (
        jax.ensure_compile_time_eval()
    ):  # the optimiser may be made in a jitted function
        least = float(live_cost(graph, kind)(counts))
    if target < least:
        what = (
            f"what cannot die of {', '.join(held)}" if held else "one channel a group"
        )
        raise BudgetError(
            f"steer: target={target!r}: {what} costs more, {budget.rounded_up(least)} "
            f"of the dense {kind}"
        )
