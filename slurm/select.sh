#!/usr/bin/env bash
# sbatch --array=0-2 slurm/select.sh configs/select/tiny.yaml run=runs/tiny
# Draw held-out masks with every checkpoint of a run, measure, and point at the best one: RUN/best.json. One GPU per
# worker; more workers than checkpoints help with batches, and whoever finishes last chooses. At low priority: it can wait.
#SBATCH --job-name=ccmdist-select
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=08:00:00
#SBATCH --nice=1000
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@300
#SBATCH --output=slurm/logs/%x-%A_%a.out
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
run_job select 0 "$@"
