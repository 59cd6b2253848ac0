"""A cluster for the whole test session, and a small world to compute in; skipped where there can be no cluster."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.small_cluster import LENGTH, TWO_BY_TWO, Cluster, Project, why_not

PORT = 26800 + 100 * (os.getpid() % 50)
"""Of the cluster of this session; others may run beside it."""


def pytest_collection_modifyitems(items):
    """Say once why Slurm is not tested here, instead of starting anything."""
    if reason := why_not():
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=reason))


def state_folder(name):
    """Where a cluster keeps its files: the paths of sockets may not be long."""
    return Path(tempfile.gettempdir()) / f"ccmdist-{name}-{os.getpid()}"


@pytest.fixture(scope="session")
def cluster():
    """A cluster of four nodes that preempts with the jobs' own signal."""
    with Cluster(state_folder("slurm"), PORT) as cluster:
        yield cluster


@pytest.fixture
def other_cluster():
    """A function that starts a cluster with other settings, which ends with the test."""
    started = []

    def start(**settings):
        started.append(Cluster(state_folder("other"), PORT + 50, **settings))
        return started[-1].__enter__()

    yield start
    for cluster in started:
        cluster.__exit__()


@pytest.fixture(scope="session")
def project(cluster, tmp_path_factory):
    """A clone from which jobs are submitted."""
    return Project(cluster, tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def straight(cluster, project, world):
    """Folder of an undisturbed run of four ranks on two nodes, started by sbatch."""
    folder = project.folder / "runs" / "straight"
    job = project.train(world, folder, *LENGTH, shape=TWO_BY_TWO)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.exit_code(job) == 0
    assert "4 ranks" in project.log(job)
    return folder
