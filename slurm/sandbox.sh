#!/usr/bin/env bash
# A real, throw-away Slurm cluster of several virtual nodes on one Linux machine, for trying things and for tests.
#
#   sudo slurm/sandbox.sh start           make the configuration and start the cluster; nothing to do when it is up
#   eval "$(slurm/sandbox.sh env)"        let sbatch, squeue, ... of this shell talk to it
#   slurm/sandbox.sh status               daemons, nodes, queue; exit code 0 when every node answers
#   sudo slurm/sandbox.sh kill n2         cut the power of node n2: its daemon and all tasks on it die at once
#   sudo slurm/sandbox.sh revive n2       start it again
#   sudo slurm/sandbox.sh stop            end all jobs and every daemon that was started here, and nothing else
#
# Debian and Ubuntu: apt-get install -y --no-install-recommends \
#     slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
#     slurmdbd slurm-wlm-mysql-plugin mariadb-server             besides, for a real sacct (ACCOUNTING=dbd)
#
# Every node has its own host name, /etc/hosts, process space and address 127.0.1.N, so that MASTER_ADDR works as on a
# cluster, and four GPUs, which are files. Where namespaces are not allowed (NAMESPACES=0), all nodes are called like
# the machine, and jobs of several nodes need MASTER_ADDR=127.0.0.1.
#
# Settings, from the environment with the prefix SLURM_SANDBOX_:
#   DIR          all of its files; keep it short, sockets lie in it   /tmp/slurm-sandbox-$UID
#   PORT         first of NODES + 11 TCP ports on 127.0.0.0/8         26800
#   NODES GPUS CPUS MEM_MB   nodes, and what each claims to have      4 4 32 256000
#   ACCOUNTING   dbd: slurmdbd and a MariaDB of its own; shim: a stand-in for sacct; none       dbd where installed
#   GRACE        seconds between the signal of a preemption and the kill                        20
#   USER_SIGNAL  1: a preempted job gets the signal of its --signal; 0: SIGTERM only            1
#   NODE_TIMEOUT seconds until a silent node is down                  10
#   KILL_WAIT    seconds between SIGTERM and SIGKILL                  30
#   NAMESPACES   1, 0, or auto                                        auto
#   EXTRA        further lines of slurm.conf
# Partitions: gpu (default), whose jobs are preempted by those of the partition high. A job that was put back waits 5 s;
# `scontrol update jobid=ID starttime=now` starts it at once.
set -euo pipefail

setting() {
    local name=SLURM_SANDBOX_$1
    printf '%s' "${!name-$2}"
}

DIR=$(setting DIR "${TMPDIR:-/tmp}/slurm-sandbox-$UID")
[[ $DIR = /* ]] || DIR=$PWD/$DIR
PORT=$(setting PORT 26800)
NODES=$(setting NODES 4)
GPUS=$(setting GPUS 4)
ACCOUNTING=$(setting ACCOUNTING auto)
NAMESPACES=$(setting NAMESPACES auto)
HOST=$(hostname -s)
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$DIR/slurm.conf

die() {
    echo "sandbox: $*" >&2
    exit 1
}

# --- daemons: remembered as "PID START_TIME", so that a PID that was given away again is never signalled -----------

start_time() { # PID: clock ticks since boot; fails for a process that is gone or only waits to be reaped
    local line fields
    line=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a fields <<<"${line##*) }"
    [ "${fields[0]}" != Z ] && echo "${fields[19]}"
}

is_alive() { # NAME
    local pid started
    read -r pid started 2>/dev/null <"$DIR/pid/$1" || return 1
    [ "$(start_time "$pid")" = "$started" ]
}

daemon() { # NAME COMMAND...: in the background, in a session of its own
    local name=$1
    shift
    setsid "$@" >"$DIR/log/$name.out" 2>&1 </dev/null &
    echo "$! $(start_time $! || echo 0)" >"$DIR/pid/$name"
}

end() { # NAME [SIGNAL]: signal it, wait up to 10 s, then kill it
    local pid attempt
    if is_alive "$1"; then
        read -r pid _ <"$DIR/pid/$1"
        kill "-${2:-TERM}" "$pid" 2>/dev/null || true
        for ((attempt = 0; attempt < 100; attempt++)); do
            is_alive "$1" || break
            sleep 0.1
        done
        ! is_alive "$1" || kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$DIR/pid/$1"
}

within() { # SECONDS COMMAND...: try until it succeeds
    local attempt attempts=$(($1 * 10))
    shift
    for ((attempt = 0; attempt < attempts; attempt++)); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.1
    done
    return 1
}

# --- configuration ------------------------------------------------------------------------------------------------

write_configuration() {
    mkdir -p "$DIR"/{ctl,spool,log,pid,dev,bin}
    chmod 755 "$DIR"
    rm -rf "$DIR"/{ctl,spool,log}/* "$DIR/bin/sacct"
    [ -s "$DIR/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
    write_slurm_conf
    write_cgroup_conf
    write_nodes
    case $ACCOUNTING in
        dbd) write_slurmdbd_conf ;;
        shim) install -m 755 "$(dirname "$0")/sandbox_sacct.sh" "$DIR/bin/sacct" ;;
    esac
    setting EXTRA "" >>"$DIR/slurm.conf"
    printf 'NAMESPACES=%s ACCOUNTING=%s NODES=%s\n' "$NAMESPACES" "$ACCOUNTING" "$NODES" >"$DIR/settings"
}

write_slurm_conf() {
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=sandbox
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire, 5 at least, is also how long a job that was put back has to wait
AuthInfo=socket=$DIR/munge.sock,cred_expire=5
StateSaveLocation=$DIR/ctl
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/ctl/slurmctld.pid
SlurmdPidFile=$DIR/spool/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
# no cgroups: they may belong to a container around us
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
# nodes claim more CPUs and memory than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmdTimeout=$(setting NODE_TIMEOUT 10)
KillWait=$(setting KILL_WAIT 30)
MinJobAge=86400
# ids are never used twice, also not by the next cluster
FirstJobId=$(($(date +%s) % 60000000 + 1))
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
CONF
    [ "$(setting USER_SIGNAL 1)" != 1 ] || echo SlurmctldParameters=preempt_send_user_signal >>"$DIR/slurm.conf"
}

write_cgroup_conf() { # before 23.02 there is no "disabled"; there, v1 touches nothing when no plugin asks for it
    local version
    version=$(slurmd -V)
    version=${version##* }
    if ((${version%%.*} < 23)); then
        echo CgroupPlugin=cgroup/v1
    else
        echo CgroupPlugin=disabled
    fi >"$DIR/cgroup.conf"
}

write_nodes() {
    local number host address gres=""
    write_gpus
    ((GPUS == 0)) || gres=" Gres=gpu:$GPUS"
    { cat /etc/hosts && echo "127.0.0.1 $HOST"; } >"$DIR/hosts"
    for ((number = 1; number <= NODES; number++)); do
        host=n$number address=127.0.1.$number
        echo "$address $host" >>"$DIR/hosts"
        [ "$NAMESPACES" = 1 ] || host=$HOST address=127.0.0.1
        echo "NodeName=n$number NodeHostName=$host NodeAddr=$address Port=$((PORT + 10 + number))" \
            "CPUs=$(setting CPUS 32) RealMemory=$(setting MEM_MB 256000)$gres"
    done >>"$DIR/slurm.conf"
    cat >>"$DIR/slurm.conf" <<CONF
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=$(setting GRACE 20)
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
}

write_gpus() { # devices that behave like /dev/null, or plain files where devices may not be made
    local number
    : >"$DIR/gres.conf"
    for ((number = 0; number < GPUS; number++)); do
        [ -e "$DIR/dev/nvidia$number" ] || mknod "$DIR/dev/nvidia$number" c 1 3 2>/dev/null ||
            : >"$DIR/dev/nvidia$number"
        echo "Name=gpu File=$DIR/dev/nvidia$number" >>"$DIR/gres.conf"
    done
}

write_slurmdbd_conf() {
    cat >>"$DIR/slurm.conf" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$DIR/munge.sock
CONF
    cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.sock
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT + 2))
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/ctl/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 3))
StorageUser=slurm
StoragePass=sandbox
StorageLoc=slurm_acct_db
CONF
    chmod 600 "$DIR/slurmdbd.conf"
}


# --- starting -----------------------------------------------------------------------------------------------------

start() {
    [ "$(id -u)" = 0 ] || die "start needs root"
    if is_alive slurmctld && is_ready; then
        echo "already up: $DIR"
        return
    fi
    stop >/dev/null 2>&1 || true
    choose
    write_configuration
    start_daemons
    within 30 is_ready || die "the nodes did not come up; see $DIR/log"
    echo "up: $NODES nodes, accounting $ACCOUNTING, namespaces $NAMESPACES, in $DIR"
}

choose() { # what "auto" means here, and whether all programs are there
    local program
    if [ "$ACCOUNTING" = auto ]; then
        if command -v slurmdbd && command -v mariadb-install-db; then ACCOUNTING=dbd; else ACCOUNTING=shim; fi >/dev/null
    fi
    if [ "$NAMESPACES" = auto ]; then
        if unshare --mount --uts --pid --fork --mount-proc true 2>/dev/null; then NAMESPACES=1; else NAMESPACES=0; fi
    fi
    for program in munged slurmctld slurmd sbatch $([ "$ACCOUNTING" != dbd ] || echo slurmdbd mariadbd); do
        command -v "$program" >/dev/null || die "there is no $program: install the packages that \`$0\` names"
    done
}

start_daemons() {
    local number
    daemon munged munged --foreground --force --key-file="$DIR/munge.key" --socket="$DIR/munge.sock" \
        --pid-file="$DIR/ctl/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed"
    within 10 munge -n -S "$DIR/munge.sock" || die "munged did not start; see $DIR/log/munged.out"
    [ "$ACCOUNTING" != dbd ] || start_accounting
    daemon slurmctld slurmctld -D
    for ((number = 1; number <= NODES; number++)); do
        start_node "n$number"
    done
}

start_node() { # NAME
    mkdir -p "$DIR/spool/$1"
    if [ "$NAMESPACES" = 0 ]; then
        daemon "$1" slurmd -D -N "$1"
        return
    fi
    # bash is the node's init and reaps orphans; --kill-child takes the whole node down with unshare
    # shellcheck disable=SC2016 # expanded by the inner shell
    daemon "$1" unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc --propagation private bash -c '
        hostname "$1" && mount --bind "$2/hosts" /etc/hosts && slurmd -D -N "$1" &
        while :; do wait && sleep 1; done' _ "$1" "$DIR"
}

start_accounting() {
    [ -d "$DIR/db/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$DIR/db" --skip-test-db \
        --auth-root-authentication-method=normal >"$DIR/log/dbinstall.log" 2>&1
    daemon mariadbd mariadbd --no-defaults --user=root --datadir="$DIR/db" --socket="$DIR/db.sock" \
        --pid-file="$DIR/ctl/db.pid" --bind-address=127.0.0.1 --port=$((PORT + 3)) \
        --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
    within 30 database -e "select 1" || die "mariadbd did not start; see $DIR/log/mariadbd.out"
    database -e "drop database if exists slurm_acct_db; create database slurm_acct_db;
        create user if not exists slurm@'127.0.0.1' identified by 'sandbox';
        create user if not exists slurm@localhost identified by 'sandbox';
        grant all on slurm_acct_db.* to slurm@'127.0.0.1'; grant all on slurm_acct_db.* to slurm@localhost;"
    daemon slurmdbd slurmdbd -D
    within 30 sacctmgr -n list cluster || die "slurmdbd did not start; see $DIR/log/slurmdbd.log"
}

database() { mariadb --no-defaults -S "$DIR/db.sock" -uroot "$@"; }

is_ready() {
    local nodes
    nodes=$(sinfo --noheader --partition=gpu --Node --format=%T | grep -cE '^(idle|mixed|allocated|completing)$')
    [ "$nodes" = "$NODES" ]
}

# --- the other commands -------------------------------------------------------------------------------------------

stop() {
    local name
    [ -d "$DIR/pid" ] || return 0
    [ ! -r "$DIR/settings" ] || recall
    # without namespaces, tasks outlive the daemon of their node
    if [ "$NAMESPACES" = 0 ] && is_alive slurmctld; then end_jobs; fi
    for name in $(node_names); do
        end "$name" "$([ "$NAMESPACES" = 1 ] && echo KILL || echo TERM)"
    done
    for name in slurmctld slurmdbd mariadbd munged; do
        end "$name"
    done
    echo stopped
}

end_jobs() {
    local state
    for state in pending running suspended; do
        timeout 10 scancel --state="$state" || true
    done
    within 15 no_jobs || echo "sandbox: some jobs did not end" >&2
}

no_jobs() { [ -z "$(timeout 5 squeue --noheader)" ]; }

node_names() {
    local file
    for file in "$DIR"/pid/n*; do
        [ ! -e "$file" ] || basename "$file"
    done
}

recall() { # the settings of the cluster that was started
    # shellcheck source=/dev/null
    . "$DIR/settings"
}

status() {
    local name
    [ -r "$DIR/settings" ] || die "was never started in $DIR"
    recall
    cat "$DIR/settings"
    for name in munged mariadbd slurmdbd slurmctld $(node_names); do
        [ ! -e "$DIR/pid/$name" ] || echo "$name: $(is_alive "$name" && echo up || echo DEAD)"
    done
    timeout 10 sinfo --Node --format="%N %P %T %G %E"
    timeout 10 squeue
    is_ready
}

show_environment() {
    echo "export CCMDIST_DEVICE=cpu" # its GPUs are only names
    echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"
    [ ! -x "$DIR/bin/sacct" ] || echo "export PATH=$(printf %q "$DIR/bin"):\$PATH"
}

cut_power() { # NODE
    is_alive "$1" || die "node $1 is not up"
    end "$1" KILL
    echo "$1: power cut"
}

revive() { # NODE
    [[ $1 =~ ^n[0-9]+$ ]] || die "there is no node $1"
    ! is_alive "$1" || die "node $1 is up"
    recall
    start_node "$1"
    echo "$1: started"
}

case ${1-} in
    start) start ;;
    stop) stop ;;
    status) status ;;
    env) show_environment ;;
    kill) cut_power "${2:?which node?}" ;;
    revive) revive "${2:?which node?}" ;;
    *)
        sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
        exit 2
        ;;
esac
