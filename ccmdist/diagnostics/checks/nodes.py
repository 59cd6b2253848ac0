"""Do all nodes of this job see one file system, one clock and each other's locks."""

import json
from typing import Any

from ccmdist.diagnostics.checks.allocation import allocation
from ccmdist.diagnostics.checks.file_system import TOLERATED_SKEW_S, Folder, folders_of
from ccmdist.diagnostics.checks.finding import Finding, Findings, Request, answer
from ccmdist.diagnostics.checks.mounts import nearest_existing
from ccmdist.diagnostics.checks.node_probe import TIMEOUT_S
from ccmdist.diagnostics.checks.trial import trial_folder

PROBE = "ccmdist.diagnostics.checks.node_probe"
SLOW_S = 5.0


def check(request: Request) -> Findings:
    """One finding per folder that is written, in a job of several nodes; nothing elsewhere."""
    nodes = allocation(request)
    if nodes is None or len(nodes.hosts) < 2:
        return
    for folder in (folder for folder in folders_of(request) if folder.is_written):
        with trial_folder(nearest_existing(folder.path)) as place:
            place.chmod(0o755)
            told = answer(nodes.on_each_node(PROBE, str(place)), 4 * TIMEOUT_S, nodes.environment)
        yield judge(folder, len(nodes.hosts), json.loads(told.strip().splitlines()[-1]))


def judge(folder: Folder, num_nodes: int, facts: dict[str, Any]) -> Finding:
    """What to say of a folder, from what the first node found."""
    what = f"{folder.role} on {num_nodes} nodes"
    if facts["num_unseen"]:
        remedy = f"put {folder.path} on a file system that all nodes share: ranks would not find their data"
        return Finding(what, "MISS", f"{facts['num_unseen']} nodes do not see what another one writes", remedy)
    found = f"a file goes there and back in {facts['round_trip_s']:.2f} s"
    if facts["lockless"]:
        remedy = "ask the site to mount with -o flock (Lustre) or a lock daemon (NFS): two jobs could write to one run"
        return Finding(what, "MISS", f"{found}; locks do not hold between nodes ({facts['lockless'][0]})", remedy)
    found += f", locks hold, clocks within {facts['clock_spread_s']:.2f} s"
    if facts["clock_spread_s"] > TOLERATED_SKEW_S:
        return Finding(what, "WARN", found, "have NTP set the nodes' clocks: logs and `ccmdist status` disagree")
    if facts["round_trip_s"] > SLOW_S:
        remedy = "nothing breaks, but a starting job may need that long to see what the last one wrote"
        return Finding(what, "WARN", found, remedy)
    return Finding(what, "OK", found)
