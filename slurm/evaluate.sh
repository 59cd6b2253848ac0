#!/usr/bin/env bash
# sbatch --array=0-3 slurm/evaluate.sh configs/evaluate/tiny.yaml     each task measures its share
# sbatch --gpus-per-node=1 --array=0-15 slurm/evaluate.sh FILE...     the same where networks are trained (downstream)
# sbatch slurm/evaluate.sh configs/evaluate/tiny.yaml                 measures what is left, compares, and reports
#SBATCH --job-name=ccmdist-evaluate
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
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
run_job evaluate 0 "$@"
