#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What every change must pass: format, lint, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh [tests/test_laws.py -k exact ...]
#
# PYTHON and JAXPRUNE_VENV: see environment.sh. JAXPRUNE_CAMVID: a CamVid folder, without
# which the tests on real frames are skipped. JAXPRUNE_TEST_PROCESSES: 2 by default.
# Without arguments, what reads JAX's programs is tested once more on Python 3.13 (or 3.11),
# if that is here too, with the JAX that is newest for it; not with JAXPRUNE_TEST_OTHER=0.

set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
environment test
cd -- "$root"

ruff format --check .
ruff check .
mypy

# Small programs: one thread in each of a few processes is quicker than many in one.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Compiling takes longer than running here, so XLA is told not to try hard.
quick="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
export XLA_FLAGS="${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false $quick}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
test() {
    python -m pytest --quiet --numprocesses "${JAXPRUNE_TEST_PROCESSES:-2}" \
        --dist loadfile --durations 15 "$@"
}
test "$@"

[[ $# -gt 0 || "${JAXPRUNE_TEST_OTHER:-1}" == 0 ]] || other="$(find_other)"
if [[ -n "${other:-}" ]]; then
    printf '\nThe transformation once more, with %s\n' "$(version "$other")"
    PYTHON="$other" JAXPRUNE_VENV="$root/.venv-other" bash "${BASH_SOURCE[0]}" \
        tests/test_{laws,zoo,trace,slim,control,recurrent,mapped,modules,register}.py \
        tests/test_{fills,primitives,project,optimisers,cost,uses}.py
fi
