#!/usr/bin/env bash
# A slice under GKE: prints a JobSet that trains, or creates it with xpk's or kubectl's help.
#   tpu/jobset.sh NAME TYPE TOPOLOGY HOSTS IMAGE RUN_DIR [train flags] | kubectl apply -f -
#   e.g. tpu/jobset.sh mine tpu-v5-lite-podslice 4x4 4 REGION-docker.pkg.dev/PROJECT/jaxlab/train:1 /runs/first
# IMAGE has jaxlab[train] and jax[tpu] installed. RUN_DIR lies in a volume claim called "runs", mounted at /runs.
# With xpk: xpk workload create --cluster CLUSTER --workload NAME --tpu-type v5litepod-16 --docker-image IMAGE \
#   --command "jaxlab train --run-dir RUN_DIR"
set -euo pipefail

if [ $# -lt 6 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 type=$2 topology=$3 hosts=$4 image=$5 run_dir=$6
shift 6
flags=''
if [ $# -gt 0 ]; then flags=$(printf ' %q' "$@"); fi
quoted=$(printf '%q' "$run_dir")
case $hosts in
  '' | *[!0-9]*)
    echo "HOSTS must be a number, got $hosts" >&2
    exit 2
    ;;
esac

# Exit code 75 means "saved, start me again" and does not count as a failure; 2 and 76 would fail again the same way.
cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
      - name: hopeless
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
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
                  operator: In
                  values: [2, 76]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 60
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $type
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: train
                  image: $image
                  ports:
                    - containerPort: 8471
                  command: [bash, -c]
                  args:
                    - >-
                      if [ -e $quoted/config.json ];
                      then exec jaxlab train --resume $quoted --grace-seconds 45;
                      else exec jaxlab train$flags --run-dir $quoted --grace-seconds 45; fi
                  resources:
                    limits:
                      google.com/tpu: 4
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: runs
YAML
