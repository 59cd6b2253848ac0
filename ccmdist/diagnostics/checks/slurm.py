"""Slurm as its controller describes it: does it requeue, warn before it preempts, account, know GPUs."""

import re
from collections.abc import Mapping
from typing import Final

from ccmdist.diagnostics.checks import lead
from ccmdist.diagnostics.checks.finding import Finding, Findings, NoAnswerError, Request, answer

TIMEOUT_S: Final = 15.0
PROGRAMS: Final = ("sbatch", "srun", "scontrol", "squeue")
DEFAULT_CRED_EXPIRE_S: Final = 120
NEVER: Final = ("UNLIMITED", "INFINITE", "NONE", "N/A", "")

Values = Mapping[str, str]


def check(request: Request) -> Findings:
    """What the controller says; without Slurm one finding."""
    try:
        config = parse_config(answer(["scontrol", "show", "config"], TIMEOUT_S))
        partitions = parse_partitions(answer(["scontrol", "show", "partition", "--oneliner"], TIMEOUT_S))
    except NoAnswerError as error:
        remedy = "log in to a cluster, or load its module; without Slurm `processes=N` trains on this machine alone"
        yield Finding("Slurm", request.lacking("slurm"), f"does not answer: {error}", remedy)
        return
    yield from judge(config, partitions)
    yield _accounting()
    yield from lead.check(request, config, {name: graces(p, config) for name, p in partitions.items()})


def judge(config: Values, partitions: Mapping[str, Values]) -> Findings:
    """What to say of the controller's settings.

    Args:
        config: Of :func:`parse_config`.
        partitions: Of :func:`parse_partitions`.
    """
    yield Finding("version", "OK", f"{config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}")
    yield _partitions(partitions)
    yield _gres(config)
    yield _requeue(config)
    yield from _preemption(config, partitions)


def parse_config(text: str) -> dict[str, str]:
    """Name -> value of the lines ``Name = value`` of `scontrol show config`; "(null)" becomes ""."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip().removeprefix("(null)") for name, _, value in pairs}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Name -> settings, from `scontrol show partition --oneliner`."""
    lines = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.startswith("PartitionName="))
    return {values["PartitionName"]: values for values in lines}


def sends_signal(config: Values) -> bool:
    """Whether a preempted job gets the signal that it asked for with --signal."""
    newer = "send_user_signal" in config.get("PreemptParameters", "").split(",")
    return newer or "preempt_send_user_signal" in config.get("SlurmctldParameters", "").split(",")


def preempts(partition: Values, config: Values) -> str:
    """How jobs of a partition are preempted: "REQUEUE", "CANCEL", ...; "" if they are not."""
    if config.get("PreemptType", "preempt/none") in ("preempt/none", "none", ""):
        return ""
    modes = {
        mode.strip() for mode in (partition.get("PreemptMode") or config.get("PreemptMode", "")).upper().split(",")
    }
    return ",".join(sorted(modes - {"OFF", "GANG", ""}))


def graces(partition: Values, config: Values) -> int | None:
    """Seconds between the signal and the end of a preempted job; None if jobs of the partition are not preempted."""
    grace = partition.get("GraceTime", "0")
    return int(grace) if preempts(partition, config) and grace.isdigit() else None


def _partitions(partitions: Mapping[str, Values]) -> Finding:
    limits = [f"{name} {values.get('MaxTime', '?')}" for name, values in partitions.items()]
    up = [name for name, values in partitions.items() if values.get("State") == "UP"]
    if not up:
        return Finding("partitions", "MISS", f"none is up of {', '.join(partitions) or 'none'}", "ask the site")
    return Finding("partitions", "OK", f"longest job: {', '.join(limits)}")


def _gres(config: Values) -> Finding:
    if "gpu" in config.get("GresTypes", "").split(","):
        return Finding("GPUs", "OK", "can be asked for (GresTypes gpu)")
    remedy = "sbatch --gpus-per-node=0, or slurm.gpus_per_node=0; for GPUs ask the site for GresTypes=gpu"
    return Finding("GPUs", "WARN", "the cluster has no kind gpu: --gpus-per-node is refused", remedy)


def _requeue(config: Values) -> Finding:
    match = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    wait = int(match[1]) if match else DEFAULT_CRED_EXPIRE_S
    found = f"a requeued job waits about {wait} s"
    if config.get("JobRequeue") == "0":
        remedy = "keep --requeue, which slurm/*.sh and launch/ ask for: the default here is to end a preempted job"
        return Finding("requeue", "WARN", f"JobRequeue=0; {found}", remedy)
    return Finding("requeue", "OK", f"JobRequeue=1; {found}")


def _preemption(config: Values, partitions: Mapping[str, Values]) -> Findings:
    modes = {name: mode for name, values in partitions.items() if (mode := preempts(values, config))}
    if not modes:
        yield Finding("preemption", "OK", "off: jobs end at their time limit alone")
        return
    found = ", ".join(f"{name} {mode}" for name, mode in modes.items())
    if lost := [name for name, mode in modes.items() if "REQUEUE" not in mode.split(",")]:
        remedy = f"submit again after a preemption in {', '.join(lost)}: a job does not come back by itself"
        yield Finding("preemption", "WARN", found, remedy)
    else:
        yield Finding("preemption", "OK", found)
    yield _user_signal(config)


def _user_signal(config: Values) -> Finding:
    if sends_signal(config):
        return Finding("preemption signal", "OK", "a preempted job gets its --signal")
    remedy = (
        "ask the site for SlurmctldParameters=preempt_send_user_signal (newer: PreemptParameters=send_user_signal). "
        "Until then only TERM comes, which training takes as well; before launch/*.py: "
        "export SUBMITIT_PREEMPT_SIGNAL=TERM, since submitit ignores TERM"
    )
    return Finding("preemption signal", "WARN", "preempt_send_user_signal is not set", remedy)


def _accounting() -> Finding:
    """Ask as submitit asks."""
    try:
        answer(["sacct", "-X", "-n", "-P", "-j", "1", "-o", "JobID,State,NodeList"], TIMEOUT_S)
    except NoAnswerError as error:
        remedy = "use slurm/*.sh, or ask the site for slurmdbd: submitit waits for ever for a job that died"
        return Finding("accounting", "WARN", f"sacct: {error}", remedy)
    return Finding("accounting", "OK", "sacct answers")
