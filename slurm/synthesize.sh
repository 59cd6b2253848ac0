#!/usr/bin/env bash
# sbatch --array=0-7 slurm/synthesize.sh configs/synthesize/tiny.yaml adapter=runs/tiny/adapter
# sbatch --array=0-3 --ntasks-per-node=4 --gpus-per-node=4 slurm/synthesize.sh ...     whole nodes: 16 workers
# Draw a synthetic set, one GPU per worker; any number of workers draws what is left, and the images are the same.
#SBATCH --job-name=ccmdist-synthesize
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=08:00:00
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
run_job synthesize 0 "$@"
