#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run on a Cloud TPU slice of any number of hosts, by the vendor's command gcloud.
#
#   bash launch/tpu.sh create NAME
#   bash launch/tpu.sh run    NAME CONFIG --workdir SHARED/DIR [arguments of jaxprune run]
#   bash launch/tpu.sh resume NAME CONFIG --workdir SHARED/DIR [...]
#   bash launch/tpu.sh log    NAME
#   bash launch/tpu.sh stop   NAME
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
# `run` starts the run on all of them, where it goes on when this command has ended; what
# it says is in ~/jaxprune.log there, and `log` follows the first host's (Ctrl-C ends that
# alone). `stop` tells it to save and leave. `resume` goes on with the same run, on a
# slice that is made anew where it was preempted. The work folder must be one that all
# hosts see and that outlives them, such as a mounted Filestore share.

set -euo pipefail

usage() {
    sed -n '6,12s/^# *//p' "${BASH_SOURCE[0]}" >&2
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

# One run at a time: by the process that jaxprune.pid names, if that is still a run.
of_run="-F jaxprune.pid -f 'jaxprune run'"

# Without a terminal, and with no file that ssh would wait for.
run() {
    [[ $# -ge 1 ]] || usage
    local quoted
    printf -v quoted '%q ' "$@"
    everywhere "if pgrep $of_run >/dev/null 2>&1; then \
echo 'a run is under way; launch/tpu.sh stop ends it' >&2; exit 2; fi; cd jaxprune && { \
nohup setsid ../venv/bin/jaxprune run ${quoted}--distributed \
>>../jaxprune.log 2>&1 </dev/null & echo \$! >../jaxprune.pid; }"
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
    log) tpu ssh --worker=0 --command "tail -n 100 -F jaxprune.log" ;;
    stop) everywhere "pkill -TERM $of_run || echo 'no run is under way'" ;;
    status) tpu describe ;;
    delete) tpu delete --quiet ;;
    *) usage ;;
esac
