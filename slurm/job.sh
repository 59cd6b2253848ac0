# shellcheck shell=bash
# What all jobs do before, around and after their tasks. Sourced by the scripts beside it, in the folder of submission.
#
#   run_job STAGE BAD_EXIT ARGUMENTS...   all that a batch script does; the functions below in this order
#   begin_job STAGE ARGUMENTS...          freeze code and settings at the first start, count the start, set the environment
#   begin_frozen_job STAGE FOLDER         the same for a job whose folder exists (launch/)
#   run_tasks BAD_EXIT                    one srun task per GPU; 1: the first that fails ends all, 0: each works for itself
#   conclude CODE                         end the script with the contract's exit code; start again if work is left
#
# JOB_LINK (set by the script) links to the job's folder. What the links' names hold cannot be a setting, whatever the
# folder is called; clusters that share a home count their jobs each for itself.
#
# Exit codes: 0 done, 75 stopped with work committed, 78 refused (mend it, submit again), 70 a task died.
# Nothing after the tasks needs Python, so it also works when the tasks run in a container.

JOB_ID=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
# What scontrol calls this job alone: an array's tasks stop and start again one by one.
REQUEUE_ID=$JOB_ID${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# A log that takes nothing more (a full disk) changes nothing in how a job ends.
say() { printf '%(%T)T %s: %s\n' -1 "$REQUEUE_ID" "$*" >&2 || :; }

run_job() {
    local stage=$1 bad_exit=$2 code=0
    shift 2
    begin_job "$stage" "$@"
    run_tasks "$bad_exit" || code=$?
    conclude "$code"
}

begin_job() {
    STAGE=$1
    shift
    AS_SUBMITTED="sbatch${SLURM_ARRAY_TASK_ID:+ --array=0-$SLURM_ARRAY_TASK_MAX} slurm/$STAGE.sh $(printf '%q ' "$@")"
    split_options "$@"
    enter
    [ -e "$JOB_LINK" ] || freeze
    CCMDIST_JOB=$(readlink -f "$JOB_LINK")
    start
}

# A launcher has frozen the job before it submitted it, and says where.
begin_frozen_job() {
    STAGE=$1 CCMDIST_JOB=$2
    AS_SUBMITTED="the same launcher (in launch/) with the arguments in $2/job.json"
    enter
    start
}

enter() {
    printf -v CCMDIST_JOB_START '%(%s)T' -1
    # The shell outlives the signals that stop its tasks, so that it can say what becomes of the job.
    trap : USR1 USR2 TERM
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
    # Modules and other scripts of a site are rarely written for `set -u`.
    local strict=${-//[!u]/}
    set +u
    # shellcheck source=slurm/env.sh
    . "$SCRIPTS/env.sh" || exit 78
    [ -z "$strict" ] || set -u
}

start() {
    export CCMDIST_JOB CCMDIST_JOB_START
    # A container brings its own packages; without one, those that modules have named are needed, but come second.
    [ -z "${CCMDIST_CONTAINER:-}" ] || PYTHONPATH=
    # Python shall not find the submit folder's code before the frozen one.
    export PYTHONPATH=$CCMDIST_JOB/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    in_environment python3 -m ccmdist job begin "$CCMDIST_JOB" || give_up $?
    set_rendezvous
}

# Settings go into the frozen config; options such as `--allow-change FIELD` to every start of the command.
split_options() {
    SETTINGS=() OPTIONS=()
    while (($#)); do
        case $1 in
            --allow-change) OPTIONS+=("$1" "${2-}") && shift ;;
            --*) OPTIONS+=("$1") ;;
            *) SETTINGS+=("$1") ;;
        esac
        (($# == 0)) || shift
    done
}

in_environment() { "${CCMDIST_PREFIX[@]}" "$@"; }

freeze() {
    local folder
    folder=$(PYTHONSAFEPATH=1 in_environment python3 -m ccmdist job snapshot "$STAGE" "${SETTINGS[@]}") || give_up $?
    # Several tasks of an array may get here at once; a rename leaves one link, and all mean the same folder.
    mkdir -p "${JOB_LINK%/*}"
    ln -sfnT "$folder" "$JOB_LINK.$SLURM_JOB_ID" && mv -T "$JOB_LINK.$SLURM_JOB_ID" "$JOB_LINK"
}

# What was refused is refused the next time too. A signal, or a file server that does not answer, is no reason to end.
give_up() {
    if (($1 > 128)); then
        again "stopped by signal $(($1 - 128)) before its tasks were started"
        exit 75
    elif (($1 == 70 && ${SLURM_RESTART_COUNT:-0} < 3)); then
        again "could not begin"
    fi
    exit "$1"
}

set_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    # Below the ports that systems hand out by themselves; another one for each job on a node, and at each start, as one
    # that a stranger has taken will not be free the next time either.
    MASTER_PORT=$((10000 + (SLURM_JOB_ID + 4999 * ${SLURM_RESTART_COUNT:-0}) % 15000))
    # Code is loaded from there: on a shared node nobody may guess the name and be there first.
    TORCH_EXTENSIONS_DIR=${CCMDIST_NODE_TMP:-/tmp}/ccmdist-$SLURM_JOB_ID-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
    export MASTER_ADDR MASTER_PORT TORCH_EXTENSIONS_DIR
    # srun no longer takes this over from sbatch.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

run_tasks() {
    local code=0
    # Without --wait=0 a site's WaitTime would end those that still work soon after the first has done its share.
    srun --kill-on-bad-exit="$1" --wait=0 "${CCMDIST_PREFIX[@]}" python3 -m ccmdist "$STAGE" "$JOB_LINK/config.json" \
        "${OPTIONS[@]}" &
    TASKS=$!
    # Slurm's own signals reach the tasks without us; one that was meant for the script alone is handed on.
    trap 'kill -USR2 "$TASKS" 2>/dev/null; INTERRUPTED=1' USR1 USR2 TERM
    while
        INTERRUPTED=
        { wait "$TASKS"; } 2>/dev/null && code=0 || code=$?
        [ -n "$INTERRUPTED" ]
    do :; done
    trap : USR1 USR2 TERM
    return "$code"
}

conclude() {
    local code=$1 state
    state=$(sed -n 's/^ *"state": "\([a-z]*\)".*/\1/p' "$CCMDIST_JOB/outcome.json" 2>/dev/null) || state=
    case ${state:-$code} in
        done | 0) say "done" && exit 0 ;;
        refused | 78) say "refused; the lines above say why, and what to do" && exit 78 ;;
        requeue | 75) again "stopped with its work committed" && exit 75 ;;
        *) again "a task ended with $code" && exit 70 ;;
    esac
}

# Ask Slurm to start the job again; not fatal where Slurm does so by itself, or does not at all.
again() {
    # Slurm ends the job that it puts back, and with it who asks for that, before the answer has been read.
    trap '' USR1 USR2 TERM
    if is_put_back; then
        say "$1; Slurm has put the job back, and it starts again by itself"
    elif is_cancelled; then
        say "$1; the job was cancelled; to go on:"
        say "  $AS_SUBMITTED"
    elif put_back; then
        say "$1; it starts again by itself"
    else
        say "$1, but cannot be put back into the queue (${ANSWER:-no answer}); to go on:"
        say "  $AS_SUBMITTED"
    fi
}

# A controller that is busy or being restarted does not answer for a while, and may have done what it was asked for.
put_back() {
    local attempt
    for attempt in 1 2 3 4 5; do
        ANSWER=$(scontrol requeue "$REQUEUE_ID" 2>&1) && return
        [[ $ANSWER = *contact* || $ANSWER = *timed\ out* || $ANSWER = *Zero\ Bytes* ]] || return 1
        sleep $((10 * attempt))
        ! is_put_back || return 0
    done
    return 1
}

# Preempted without grace, or by `scontrol requeue`: Slurm counts the next start before this one has ended.
is_put_back() {
    local restarts
    restarts=$(scontrol show job "$REQUEUE_ID" 2>/dev/null | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') || restarts=
    ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0}))
}

# Ended from outside although there was time left. A requeue of ours would undo that; a job whose time is up goes on.
is_cancelled() {
    local state
    state=$(squeue --noheader --jobs="$REQUEUE_ID" --format="%T %r" 2>/dev/null) || state=
    [[ $state = COMPLETING* && $state != *TimeLimit ]]
}
