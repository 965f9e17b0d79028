#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything on a bare machine with Python 3.11 or newer: an environment of its own in
# .venv, then a SegNet trained, pruned, retrained and shown, on synthetic street scenes.
#
#   bash launch/quickstart.sh [DIR]        where to work (runs/quickstart)
#
# A second start resumes what was stopped. PYTHON and JAXPRUNE_VENV: see environment.sh.

set -euo pipefail

case "${1:-}" in
/*) workdir="$1" ;;
?*) workdir="$PWD/$1" ;;
*) workdir="" ;;
esac

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
environment all
workdir="${workdir:-$root/runs/quickstart}"

cd -- "$root"
jaxprune run configs/quickstart.py --workdir "$workdir"
printf 'network: %s  (jaxprune.load opens it)\n' "$workdir/final"
