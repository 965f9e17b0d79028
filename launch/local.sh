#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run as several processes of this machine, to try what a cluster does.
#
#   bash launch/local.sh PROCESSES CONFIG [arguments of jaxprune run]
#
# (One process already uses all devices of a host: this is no faster.) SIGTERM and Ctrl-C go
# on to all of them. When one fails, the others have GRACE seconds (60) to end by
# themselves. The exit code is the first process's that was not 0.

set -euo pipefail

if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: bash launch/local.sh PROCESSES CONFIG [arguments]\n' >&2
    exit 2
fi
processes="$1"
shift
if ! command -v jaxprune >/dev/null; then
    # shellcheck source=launch/environment.sh
    source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
    environment all
fi

free_port='import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'
port="$(python3 -c "$free_port")"

pids=()
for ((index = 0; index < processes; index++)); do
    jaxprune run "$@" --distributed "127.0.0.1:$port,$processes,$index" \
        2> >(sed -u "s/^/[$index] /" >&2) &
    pids+=($!)
done
# shellcheck disable=SC2317  # the trap calls it
all() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'all TERM' TERM INT

code=0
watchdog=""
while ((${#pids[@]})); do
    left=()
    for pid in "${pids[@]}"; do
        if kill -s 0 "$pid" 2>/dev/null; then
            left+=("$pid")
        else
            status=0
            wait "$pid" || status=$?
            ((code)) || code="$status"
        fi
    done
    pids=("${left[@]}")
    if ((code && ${#pids[@]})) && [[ -z "$watchdog" ]]; then
        (sleep "${GRACE:-60}" && kill -KILL "${pids[@]}" 2>/dev/null) >/dev/null 2>&1 &
        watchdog=$!
    fi
    ((!${#pids[@]})) || sleep 0.2 || true
done
[[ -z "$watchdog" ]] || kill "$watchdog" 2>/dev/null || true
exit "$code"
