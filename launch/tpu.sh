#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run on a Cloud TPU slice of any number of hosts, by the vendor's command gcloud.
#
#   bash launch/tpu.sh create NAME
#   bash launch/tpu.sh run    NAME CONFIG --workdir SHARED/DIR [arguments of jaxprune run]
#   bash launch/tpu.sh resume NAME CONFIG --workdir SHARED/DIR [...]
#   bash launch/tpu.sh status NAME
#   bash launch/tpu.sh delete NAME
#
#   ZONE       where                              (gcloud's configured one)
#   TYPE       the slice                          (v6e-8)
#   VERSION    of its software                    (v2-alpha-tpuv6e)
#   SPOT=0     do not take preemptible machines
#   DRY_RUN=1  print the commands instead
#
# `create` makes the slice and installs this commit of the checkout on all of its hosts.
# `run` starts the run on all of them. `resume` is for a slice that was preempted: it is
# made anew if it is gone, and the same run goes on. The work folder must be one that all
# hosts see and that outlives them, such as a mounted Filestore share.

set -euo pipefail

usage() {
    sed -n '6,10s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
[[ $# -ge 2 ]] || usage
verb="$1" name="$2"
shift 2
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
zone=()
[[ -z "${ZONE:-}" ]] || zone=(--zone "$ZONE")

do_() {
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}
tpu() { do_ gcloud compute tpus tpu-vm "$1" "$name" "${zone[@]}" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command "$1"; }

create() {
    local spot=(--spot) archive
    [[ "${SPOT:-1}" != 0 ]] || spot=()
    tpu create --accelerator-type "${TYPE:-v6e-8}" \
        --version "${VERSION:-v2-alpha-tpuv6e}" "${spot[@]}"
    archive="$(mktemp -d)/jaxprune.tar.gz"
    git -C "$root" archive --prefix=jaxprune/ -o "$archive" HEAD
    do_ gcloud compute tpus tpu-vm scp "$archive" "$name:jaxprune.tar.gz" \
        "${zone[@]}" --worker=all
    everywhere "tar xzf jaxprune.tar.gz && python3 -m venv venv && \
venv/bin/pip install --quiet 'jax[tpu]' './jaxprune[all]'"
}

run() {
    [[ $# -ge 1 ]] || usage
    local quoted
    printf -v quoted '%q ' "$@"
    everywhere "cd jaxprune && ../venv/bin/jaxprune run ${quoted}--distributed"
}

ready() {
    [[ "${DRY_RUN:-0}" != 1 ]] || return 1
    [[ "$(gcloud compute tpus tpu-vm describe "$name" "${zone[@]}" \
        --format 'value(state)' 2>/dev/null)" == READY ]]
}

case "$verb" in
    create) create ;;
    run) run "$@" ;;
    resume)
        [[ $# -ge 1 ]] || usage
        if ! ready; then # a preempted slice stays listed until it is deleted
            tpu delete --quiet || true
            create
        fi
        run "$@"
        ;;
    status) tpu describe ;;
    delete) tpu delete --quiet ;;
    *) usage ;;
esac
