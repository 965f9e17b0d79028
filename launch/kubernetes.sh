#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Prints a JobSet for one run on several hosts of a Kubernetes cluster.
#
#   bash launch/kubernetes.sh NAME IMAGE HOSTS CONFIG [arguments of jaxprune run] |
#       kubectl apply -f -
#
#   CLAIM     the claim of the volume for work folders, which all hosts mount   (jaxprune)
#   RESOURCE  what each host has to have, such as google.com/tpu=4    (nvidia.com/gpu=1)
#   SELECT    labels of the nodes, such as cloud.google.com/gke-tpu-topology=4x4,...  (none)
#   RESTARTS  how often it may be preempted, killed or lose a host                  (100)
#
# The cluster needs the JobSet controller (0.6 or newer); the image needs `jaxprune` on
# its PATH and the config in its working directory (launch/Dockerfile builds one). The work
# folder is /work/NAME on the claim's volume. A host that is lost makes all start again,
# and the run goes on from its last save; bad input (exit code 2) and failures that would
# come again (1: a loss that is not finite, a full disk) fail it at once.

set -euo pipefail

if [[ $# -lt 4 || ! "$1" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ || ! "$3" =~ ^[1-9][0-9]*$ ]]
then
    printf 'error: bash launch/kubernetes.sh NAME IMAGE HOSTS CONFIG [arguments]\n' >&2
    printf 'NAME: lower-case letters, digits and dashes, 40 at most\n' >&2
    exit 2
fi
name="$1" image="$2" hosts="$3"
shift 3
resource="${RESOURCE:-nvidia.com/gpu=1}"

# JSON's strings are YAML's too.
quoted() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }

selector() {
    [[ -n "${SELECT:-}" ]] || return 0
    local label
    printf '              nodeSelector:\n'
    for label in ${SELECT//,/ }; do
        printf '                %s: %s\n' "${label%%=*}" "$(quoted "${label#*=}")"
    done
}

arguments() {
    local argument
    for argument in run "$@" --workdir "/work/$name" --distributed; do
        # Kubernetes replaces $(NAME) in arguments; $$ keeps a dollar.
        printf '                    - %s\n' "$(quoted "${argument//\$/\$\$}")"
    done
    # shellcheck disable=SC2016  # it is Kubernetes' to expand
    printf '                    - "%s-hosts-0-0.%s:1234,%d,$(JOB_COMPLETION_INDEX)"\n' \
        "$name" "$name" "$hosts"
}

cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: jaxprune
                  operator: In
                  values: [1, 2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
$(selector)
              containers:
                - name: jaxprune
                  image: $(quoted "$image")
                  command: [jaxprune]
                  args:
$(arguments "$@")
                  ports:
                    - containerPort: 1234
                  resources:
                    limits:
                      ${resource%%=*}: ${resource#*=}
                  volumeMounts:
                    - name: work
                      mountPath: /work
              volumes:
                - name: work
                  persistentVolumeClaim:
                    claimName: ${CLAIM:-jaxprune}
END
