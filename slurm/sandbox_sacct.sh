#!/usr/bin/env bash
# A stand-in for sacct in a sandbox without slurmdbd, for what submitit asks: sacct -j ID[,ID] -o JobID,State,NodeList [-n]
# slurmctld answers; it remembers ended jobs for MinJobAge.
ids="" heading=1 format=JobID,State,NodeList
while (($#)); do
    case $1 in
        -j | --jobs) ids+=,$2 && shift ;;
        --jobs=*) ids+=,${1#*=} ;;
        -j*) ids+=,${1#-j} ;;
        -o | --format) format=$2 && shift ;;
        --format=*) format=${1#*=} ;;
        -n | --noheader) heading="" ;;
    esac
    shift
done
declare -A letters=([jobid]=%i [state]=%T [nodelist]=%N [jobname]=%j [partition]=%P [start]=%S [end]=%e [elapsed]=%M
    [nnodes]=%D)
output=""
for field in ${format//,/ }; do
    field=${field%%%*}
    letter=${letters[${field,,}]-}
    [ -n "$letter" ] || { echo "sacct: the stand-in knows no field $field" >&2 && exit 1; }
    output+="|$letter"
done
[ -z "$heading" ] || echo "${format//,/|}"
squeue --noheader --array --states=all ${ids:+--jobs="${ids#,}"} --format="${output#|}" | sed -E '
    s/\b(CONFIGURING|SIGNALING|STAGE_OUT|STOPPED|RESIZING)\b/RUNNING/
    s/\b(REQUEUE_HOLD|REQUEUE_FED|SPECIAL_EXIT)\b/PENDING/
    s/\(null\)//g'
exit 0
