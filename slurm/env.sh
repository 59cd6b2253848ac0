# shellcheck shell=bash disable=SC2034 # what job.sh uses
# The one file that a new site edits: what a job needs on this cluster.
# The scripts in this folder read it; read it yourself before `sbatch` or `python launch/...`, so that both find
# the account and the partition:      . slurm/env.sh

# --- edit from here ---------------------------------------------------------------------------------------------

# Whom to charge, and where to run. sbatch reads both; an option on its command line wins.
#export SBATCH_ACCOUNT=my_project
#export SBATCH_PARTITION=gpu

# Either an environment (venv or conda) in which ccmdist is installed, and the modules it was built with ...
#module purge
#module load python/3.11 cuda/12.8
CCMDIST_VENV=${CCMDIST_VENV:-.venv}

# ... or an Apptainer image in which it is installed. Empty: no container.
CCMDIST_CONTAINER=${CCMDIST_CONTAINER:-}
# Folders outside the project that jobs read or write (data, models), seen by the container under the same names.
CCMDIST_BIND=${CCMDIST_BIND:-}

# The fast network between the nodes, where NCCL picks another one (see `ip -brief address` on a node).
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A folder on each node's own disk for code that is compiled there, for tables that are made of the model (a few GB)
# and, with data.stage_model=true, for a copy of its transformer (41 GB); shared ones slow every start down.
export CCMDIST_NODE_TMP=${CCMDIST_NODE_TMP:-/tmp}

# Caches, runs and reports hold images of patients: nobody outside the group reads them.
umask 027

# --- to here; the rest holds everywhere -------------------------------------------------------------------------

# Nodes have no internet, and a login node need not ask for what lies on the disk.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# The words before every command: none in a virtual environment.
CCMDIST_PREFIX=()
if [ -n "$CCMDIST_CONTAINER" ]; then
    if ! command -v apptainer >/dev/null; then
        echo "ccmdist: there is no apptainer on $(hostname) for CCMDIST_CONTAINER=$CCMDIST_CONTAINER;" \
            "load its module in slurm/env.sh" >&2
        return 78
    fi
    CCMDIST_PREFIX=(apptainer exec --nv --bind "$PWD${CCMDIST_BIND:+,$CCMDIST_BIND}" --pwd "$PWD" "$CCMDIST_CONTAINER")
elif [ -x "$CCMDIST_VENV/bin/python3" ]; then
    PATH=$(realpath --no-symlinks "$CCMDIST_VENV/bin"):$PATH # all that activating it would do for a job
else
    echo "ccmdist: there is no virtual environment at $CCMDIST_VENV; make one with \`make install\`," \
        "or set CCMDIST_VENV or CCMDIST_CONTAINER in slurm/env.sh" >&2
    return 78
fi
