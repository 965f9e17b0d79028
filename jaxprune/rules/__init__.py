# SPDX-License-Identifier: Apache-2.0
"""The rule table: one analysis rule and one rewrite rule per primitive, by its name."""

from jaxprune.rules import calls, elementwise, indexing, linear, reduce, shape
from jaxprune.walk import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shape.RULES,
    **indexing.RULES,
    **linear.RULES,
    **reduce.RULES,
    **calls.RULES,
}
