#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run on the nodes of a SLURM job, which goes back into the queue until it is done.
#
#   sbatch --nodes 4 launch/slurm.sh CONFIG --workdir SHARED/DIR [arguments of jaxprune run]
#
# The work folder must be one that all nodes see. Two minutes before the time limit, and
# when the job is preempted, the run saves and leaves; the job is then queued anew and goes
# on from there. So it does where a process is killed, lost or stuck. Other failures end
# the job. sbatch's own arguments (--partition, --gres, --time, ...) override the lines
# below; activate the environment before, or name its folder: JAXPRUNE_VENV.
#
#   RESTARTS  how often it may go back into the queue                               (100)

#SBATCH --job-name=jaxprune
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -euo pipefail

if [[ $# -lt 1 || -z "${SLURM_JOB_ID:-}" ]]; then
    printf 'error: sbatch launch/slurm.sh CONFIG --workdir DIR [arguments]\n' >&2
    exit 2
fi
[[ -z "${JAXPRUNE_VENV:-}" ]] || export PATH="$JAXPRUNE_VENV/bin:$PATH"

# A process that has saved may leave before another one has: none is killed for it.
status=0
srun --kill-on-bad-exit=0 --wait=120 jaxprune run "$@" --distributed || status=$?

case "$status" in
    75 | 143 | 134 | 137) # saved and left, ended before it could; aborted by JAX, killed
        if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-100})); then
            printf 'jaxprune: job %s was restarted %s times; no more (RESTARTS)\n' \
                "$SLURM_JOB_ID" "$SLURM_RESTART_COUNT"
            exit "$status"
        fi
        printf 'jaxprune: job %s goes back into the queue\n' "$SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) exit "$status" ;;
esac
