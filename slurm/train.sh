#!/usr/bin/env bash
# sbatch slurm/train.sh configs/train/tiny.yaml
# sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/train.sh configs/train/wdlora.yaml run=runs/a
# Train an adapter or a network, one task per GPU. Preempted, out of time or on a lost node, it goes on from its last checkpoint.
#SBATCH --job-name=ccmdist-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@300
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this script with sbatch}"
JOB_LINK=slurm/logs/${SLURM_CLUSTER_NAME:-slurm}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.job
SCRIPTS=slurm
[ ! -e "$JOB_LINK" ] || SCRIPTS=$JOB_LINK/code/slurm # as they were at the first start
# shellcheck source=slurm/job.sh
. "$SCRIPTS/job.sh" || {
    echo "ccmdist: there is no slurm/job.sh in $PWD; submit from the clone of the project" >&2
    exit 78
}
run_job train 1 "$@"
