# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Sourced by the scripts beside it: `environment EXTRA` makes this checkout's own Python
# environment, installs the package with that extra, and puts its commands on PATH.
#
#   PYTHON         the interpreter to build it with   (the first that is 3.11 or newer)
#   JAXPRUNE_VENV  where it lies                      (.venv in the checkout)

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAXPRUNE_VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"

stop() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || stop "PYTHON=$PYTHON is not a Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    stop "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python"
}

# The newest Python that is supported where the environment has another one, and else the
# oldest; nothing where it is not here.
find_other() {
    local wanted=3.13 candidate
    [[ "$(version "$venv/bin/python")" != "Python $wanted" ]] || wanted=3.11
    for candidate in "python$wanted" \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$wanted".*/bin/python; do
        if new_enough "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null
        then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

version() {
    "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])'
}

make_venv() {
    local python="$1"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || stop \
        "$python cannot make environments: its venv module is missing" \
        "(Debian, Ubuntu: apt install python3-venv)"
    printf 'Making the environment %s\n' "$venv"
    "$python" -m venv "$venv" || stop "$python could not make $venv"
}

environment() {
    local extra="$1" python="$venv/bin/python" chosen stamp state
    unset PYTHONHOME
    if [[ ! -e "$python" || -n "${PYTHON:-}" ]]; then
        chosen="$(find_python)"
        [[ -e "$python" ]] || make_venv "$chosen"
    fi
    new_enough "$python" || stop \
        "$venv is no environment of Python 3.11 or newer; remove it and start anew"
    if [[ -n "${PYTHON:-}" && "$(version "$python")" != "$(version "$PYTHON")" ]]; then
        stop "$venv has $(version "$python"), PYTHON=$PYTHON is $(version "$PYTHON");" \
            "remove it, or set JAXPRUNE_VENV to another folder"
    fi
    export PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
    # Where there is no home folder, caches go into the environment.
    [[ -n "${HOME:-}" ]] || export HOME="$venv"

    # Installed once for each state of pyproject.toml, so that a second start is quick.
    stamp="$venv/.jaxprune-$extra"
    state="$root $("$python" -V) $(cksum <"$root/pyproject.toml")"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$state" ]]; then
        printf 'Installing jaxprune[%s] and what it needs (some minutes)\n' "$extra"
        "$python" -m pip --version >/dev/null 2>&1 ||
            "$python" -m ensurepip >/dev/null 2>&1 || stop \
            "$venv has no pip; remove it and start anew"
        "$python" -m pip install --quiet --editable "${root}[$extra]" || stop \
            "the installation failed; is the package index within reach?"
        printf '%s\n' "$state" >"$stamp"
    fi
}
