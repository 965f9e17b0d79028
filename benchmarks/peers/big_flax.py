# SPDX-License-Identifier: Apache-2.0
"""The large networks in Flax."""

BIG = {}
