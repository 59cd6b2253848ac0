"""Systems beside WDLoRA by `sbatch slurm/train.sh` on a real Slurm: told to stop once, they go on and are exported."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline

from ccmdist.adapters.state import PEFT_FILE, read_adapter
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.loading import load
from ccmdist.jobs.adapter import verify
from ccmdist.models.make_mllm import make_mllm
from ccmdist.models.network_state import read_network
from ccmdist.precompute.fill import fill_cache
from ccmdist.train.llm_adapter import LLM_ADAPTER
from ccmdist.train.mdf_network import network_of
from tests.distributed.small_backbones import make_backbone
from tests.distributed.small_dual import HOLES
from tests.distributed.small_networks import SETTINGS_OF
from tests.distributed.small_world import data_overrides

pytestmark = pytest.mark.slurm

NUM_STEPS, NUM_LINEARS = 20, 44
LENGTH = (f"num_steps={NUM_STEPS}", "checkpoint.every_steps=10", "validation.every_steps=20")
NO_ADAPTER = ("activation_checkpointing=null",)
"""Beside what SETTINGS_OF says: tiny.yaml sets what belongs to an adapter alone."""
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def stopped_once(cluster, project, world, folder, *overrides, configs):
    """Log of a run of two ranks that is told to stop after a few steps, and put back."""
    job = project.train(world, folder, *LENGTH, *overrides, shape=ON_TWO_NODES, configs=configs)
    project.wait_for_line(job, r"step \d+/", 5)
    restarts = cluster.restarts(job)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_until_back(job, restarts)
    cluster.wait_for(job, "COMPLETED")
    first, second = RunDirectory(folder).attempts()
    assert 0 < first["last_step"] == second["first_step"] < NUM_STEPS == second["last_step"]
    log = project.log(job)
    assert "2 ranks" in log
    return log


def test_ranks_grow_before_and_after_a_stop_and_are_exported_as_they_have_grown(cluster, project, world, tmp_path):
    folder = tmp_path / "selora"
    often = ("adapter.lora_rank=8", "adapter.growth.every_steps=3", "adapter.growth.fisher_ratio=1.0001")
    log = stopped_once(
        cluster, project, world, folder, *often, "adapter.growth.rank_budget=200", configs=("tiny", "tiny_selora")
    )
    told = re.findall(r"one rank more, (\d+) in all, after (\d+) updates", log)
    stop = RunDirectory(folder).attempts()[0]["last_step"]
    assert min(int(step) for _, step in told) <= stop < max(int(step) for _, step in told)
    totals = [int(total) for total, _ in told]
    assert totals[0] > NUM_LINEARS
    assert sorted(set(totals)) == totals
    assert sum(read_adapter(folder / "adapter").lora_ranks.values()) == totals[-1]


def test_two_adapters_are_trained_in_turn_and_both_are_exported(cluster, project, world, tmp_path):
    folder = tmp_path / "dual"
    cached = project.sbatch("slurm/precompute.sh", "configs/precompute/tiny.yaml", *data_overrides(world), *HOLES)
    cluster.wait_for(cached, "COMPLETED")
    stopped_once(cluster, project, world, folder, *HOLES, configs=("tiny", "tiny_dual"))
    synthesis, completion = (read_adapter(folder / "adapter" / name) for name in ("synthesis", "completion"))
    assert synthesis.tensors.keys() == completion.tensors.keys()
    for adapter in (synthesis, completion):
        assert all(of["lora_B"].any() for of in adapter.tensors.values())
    assert not any(
        torch.equal(of["lora_B"], completion.tensors[name]["lora_B"]) for name, of in synthesis.tensors.items()
    )


def test_an_msdm_is_trained_in_its_two_stages_and_stock_diffusers_opens_what_it_leaves(
    cluster, project, world, tmp_path
):
    vae, folder = tmp_path / "vae", tmp_path / "msdm"
    stage_one = ("num_steps=4", *NO_ADAPTER, *SETTINGS_OF["msdm_vae"])
    first = project.train(world, vae, *stage_one, shape=ON_TWO_NODES)
    cluster.wait_for(first, "COMPLETED")
    encoders = f"data.model={vae}/network"
    fill_cache(load(PrecomputeConfig, [], [*data_overrides(world), encoders]), 0, 1)
    stage_two = (*NO_ADAPTER, *SETTINGS_OF["msdm"], encoders)
    stopped_once(cluster, project, world, folder, *stage_two, configs=("tiny",))
    pipe = DiffusionPipeline.from_pretrained(folder / "network", local_files_only=True)
    assert type(pipe) is StableDiffusionInstructPix2PixPipeline
    assert read_network(folder / "network").about.facts["step"] == str(NUM_STEPS)


def test_an_mdf_mllm_goes_on_and_is_exported_with_gates_that_have_moved_and_an_adapter_for_peft(
    cluster, project, world, tmp_path
):
    folder = tmp_path / "mdf"
    make_mllm("mllama", tmp_path / "mllama")
    chosen = (*NO_ADAPTER, *SETTINGS_OF["diagnose"], f"objective.mllm={tmp_path}/mllama")
    stopped_once(cluster, project, world, folder, *chosen, configs=("tiny",))
    network = network_of(read_network(folder / "network"), torch.device("cpu"))
    assert len(network.gates()) == 4
    assert all(network.gates().values())
    assert (folder / "network" / LLM_ADAPTER / PEFT_FILE).is_file()


@pytest.mark.parametrize("kind", ["flux", "kandinsky5"])
def test_an_adapter_on_another_model_goes_on_and_stock_diffusers_loads_what_is_exported(
    cluster, project, world, tmp_path, kind
):
    folder, model = tmp_path / "run", world / kind
    make_backbone(world, kind)
    log = stopped_once(cluster, project, world, folder, f"data.model={model}", configs=("tiny", f"tiny_{kind}"))
    assert "sharding: zero3" in log
    verify(folder / "adapter", model)
    assert all(of["lora_B"].any() for of in read_adapter(folder / "adapter").tensors.values())
