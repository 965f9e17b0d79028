# SPDX-License-Identifier: Apache-2.0
"""The rule table: one analysis rule and one rewrite rule per primitive, by its name."""

from typing import Any

from jaxprune import shuffles
from jaxprune.base import GraphError
from jaxprune.jaxpr import Site
from jaxprune.labels import Value
from jaxprune.rules import (
    calls,
    control,
    elementwise,
    indexing,
    linear,
    mapped,
    reduce,
    shape,
    shuffle,
)
from jaxprune.walk import Context, Cut, Rule, freeze_all

__all__ = [
    "RULES",
    "Context",
    "Cut",
    "Rule",
    "Site",
    "Value",
    "freeze_all",
    "register_rule",
]

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shape.RULES,
    **shuffle.RULES,
    **indexing.RULES,
    **linear.RULES,
    **reduce.RULES,
    **calls.RULES,
    **control.RULES,
    **mapped.RULES,
}


def register_rule(primitive: Any, rule: Rule, *, replace: bool = False) -> Rule | None:
    """Teach `trace` and `slim` a primitive, for the rest of the process.

    Args:
      primitive: a `jax.extend.core.Primitive`, or its name.
      rule: `Rule(analyse, rewrite)`, see docs/rules.md for both and an example.
      replace: allow a primitive that has a rule already.

    With a rule of their own for reshape or transpose, channel shuffles are followed
    step by step, which ties their channels.

    Returns the rule that it had, or None. Raises GraphError where it has one and
    `replace` is False.
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    old = RULES.get(name)
    if old is not None and not replace:
        raise GraphError(f"{name} has a rule already; pass replace=True to replace it")
    RULES[name] = rule
    if name in shuffles.OF:  # or its rule would not be asked inside of shuffles
        RULES.pop(shuffles.NAME, None)
    return old
