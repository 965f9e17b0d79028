# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxprune`."""

import sys

from jaxprune import cli

sys.exit(cli.main())
