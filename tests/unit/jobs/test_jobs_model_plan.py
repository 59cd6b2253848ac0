"""`ccmdist model plan` says in text and in JSON what a run needs, and refuses what cannot be, without torch."""

import functools
import json
import re
from pathlib import Path

import pytest

from ccmdist.cli import exit_code
from ccmdist.config.slurm import SlurmSettings
from ccmdist.jobs import model_plan
from ccmdist.jobs.model_plan import Asked, base_of, machine_of
from tests.distributed.small_world import data_overrides
from tests.unit.planner.planned import config

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs/train/wdlora.yaml")


def told(capsys, *arguments, code=0):
    """What the command prints on standard output, or on error when it is refused."""
    assert exit_code(["model", "plan", CONFIG, *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def as_json(capsys, *arguments):
    return json.loads(told(capsys, *arguments, "--json"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Where no model, shards or cache are, and nobody has started this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_the_text_answers_what_a_student_asks(capsys):
    text = told(capsys, "--gpus", "64", "--gpu", "h200", "--fabric", "nvlink-2x200g", "global_batch_size=256")
    assert text.startswith(
        "models/Qwen-Image-Edit-2509 is not there yet: planned with the published Qwen-Image-Edit 2509"
    )
    for expected in (
        r"64 x h200, 8 on each node: NVLink in a node, two 200 Gbit/s adapters between nodes",
        r"20\.43 B parameters, of which 13\.62 B are held, in bf16",
        r"1408 tokens \(image 576, mask 576, text 256\); 20\.6 TFLOP forward",
        r"mode +replicated: the fastest that fits",
        r"fits +yes: \d\d\.\d GB \(estimate\) of 141 GB",
        r"step +0\.\d+ s predicted at 40% of peak \(assumed\)",
        r"images/s +\d+\.\d predicted, [56]\.\d+ per GPU",
        r"break-even +micro-batch \d+\.\d",
        r"start +66 s predicted: 29\.1 GB per node at 5 GB/s and 60 s of set-up \(assumed\)",
        r"finish +\d+\.\d min predicted in 1 start of at most 24 h",
        r"frozen weights +27\.25",
        r"received by each GPU in a step",
        r"zero3 +\d+\.?\d* +\d\.\d+ +\d+ +sends more",
        r"activation_checkpointing=selective +\d+\.?\d* +\d+ +fits",
        r"NVIDIA\s+H200 data sheet",
    ):
        assert re.search(expected, text), expected
    assert max(map(len, text.splitlines())) <= 100


def test_an_efficiency_that_is_not_given_is_the_planner_s(capsys, monkeypatch):
    monkeypatch.setattr(model_plan, "Asked", functools.partial(Asked, efficiency=0.3))
    assert as_json(capsys, "--gpus", "8")["machine"]["efficiency"] == 0.3


def test_json_holds_the_same_figures(capsys):
    found = as_json(capsys, "--gpus", "8", "--gpu", "a100", "--efficiency", "0.5")
    assert found["sharding"] == "replicated"
    assert found["machine"] == {
        "gpu": "a100",
        "fabric": "nvlink-8x400g",
        "num_gpus": 8,
        "gpus_per_node": 8,
        "efficiency": 0.5,
        "file_system_bytes_per_s": 5e9,
    }
    assert found["forward_flops"] == pytest.approx(20.6e12, rel=5e-3)
    chosen = next(choice for choice in found["choices"] if choice["sharding"] == "replicated")
    total = chosen["memory"].pop("total")
    assert total == pytest.approx(sum(chosen["memory"].values()))
    assert chosen["images_per_s"] == pytest.approx(32 / chosen["step"]["overlapped_s"])
    assert found["finish"]["num_starts"] == 1
    assert "is not there yet" in found["note"]


def test_one_gpu_is_told_of_no_traffic(capsys):
    text = told(capsys, "--gpu", "h100")
    assert "1 x h100" in text
    assert "one GPU has nobody to share with" in text
    assert "received" not in text
    assert "break-even" not in text


def test_scaling_shows_every_mode_on_every_fabric(capsys):
    text = told(capsys, "--scaling", "--gpu", "h200")
    assert text.splitlines()[2].startswith("predicted efficiency on h200, micro_batch_size 4 on every GPU")
    for fabric in ("nvlink-8x400g", "nvlink-2x200g"):
        for mode, figures in (("replicated", 3), ("zero3_hpz", 2), ("zero3", 3)):
            assert re.search(rf"{fabric} +{mode} +(\d\.\d\d / \d\.\d\d *){{{figures}}}\n", text), (fabric, mode)
    rows = as_json(capsys, "--scaling", "--gpu", "h200")["rows"]
    assert {row["num_gpus"] for row in rows} == {8, 64, 512}


def test_a_short_limit_is_told_in_starts_and_a_shorter_one_as_never(capsys):
    assert re.search(r"predicted in 5 starts of at most 60 min", told(capsys, "--time-limit-min", "60"))
    text = told(capsys, "--time-limit-min", "5")
    assert re.search(r"never: a time limit of 5 min ends each job before its first\s+step; ask for more", text)


def test_a_mode_that_was_set_is_shown_though_it_does_not_fit(capsys):
    text = told(capsys, "--gpu", "rtx4090", "--gpus", "8", "sharding=replicated")
    assert re.search(r"fits +NO: \d\d\.\d GB \(estimate\) of 24 GB", text)
    assert re.search(r"replicated .* as set\s", text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "h20"], r"--gpu: 'h20' is no GPU that is known here; did you mean 'h200'\?"),
        (["--fabric", "nvlink-2x20g"], r"--fabric: 'nvlink-2x20g' is no fabric .*; did you mean 'nvlink-2x200g'\?"),
        (["--gpus", "5000"], r"Invalid value for '--gpus'.*4096"),
        (["--gpuz", "5"], r"No such option: --gpuz.*--gpus"),
        (["--gpus", "64"], r"64 GPUs with micro_batch_size 4 need a multiple of 256; use global_batch_size=256"),
        (["--gpu", "rtx4090"], r"sharding: nothing fits 1 x 24 GB, .*; would fit: base=nf4"),
        (["adapter.lora_rnk=4"], r"lora_rnk: no such field; did you mean 'lora_rank'\?"),
        (["slurm.nodez=4"], r"slurm.nodez: no such field; did you mean 'nodes'\?"),
        (
            ["adapter.targets=[attn.to_x]"],
            r"adapter.targets: 'attn.to_x' matches none .*; use attn, mlp, or suffixes of",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(capsys, arguments, expected):
    assert re.search(rf"^ccmdist: [\s\S]*{expected}", told(capsys, *arguments, code=78))


def test_the_machine_is_what_was_asked_of_slurm_unless_the_command_line_says_otherwise():
    slurm = SlurmSettings(nodes=4, gpus_per_node=4, gpu_type="A100")
    found = machine_of(config(), slurm, Asked())
    assert (found.gpu, found.num_gpus, found.gpus_per_node, found.num_nodes) == ("a100", 16, 4, 4)
    other = machine_of(config(), slurm, Asked(gpus=8, gpus_per_node=8, gpu="l40s"))
    assert (other.gpu, other.fabric, other.num_gpus, other.num_nodes) == ("l40s", "pcie-1x200g", 8, 1)


def test_without_slurm_the_machine_has_as_many_gpus_as_the_run_has_processes(monkeypatch):
    assert machine_of(config("processes=4"), SlurmSettings(), Asked()).num_gpus == 4
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    found = machine_of(config(), SlurmSettings(), Asked())
    assert (found.num_gpus, found.gpus_per_node) == (16, 8)


@pytest.mark.parametrize(
    ("name", "version"), [("Qwen-Image-Edit", "v1"), ("Qwen-Image-Edit-2511", "2511"), ("x", "2509")]
)
def test_a_model_that_is_not_there_is_told_by_the_name_of_its_folder(name, version):
    base = base_of(config(f"data.model=models/{name}"))
    assert base.version == version
    assert base.transformer == {"zero_cond_t": version == "2511"}


def test_a_model_and_a_cache_that_are_there_are_read(world, capsys):
    chosen = config(*data_overrides(world))
    base = base_of(chosen)
    assert (base.version, base.transformer["num_layers"]) == ("2509", 4)
    assert base.note.endswith(f"Qwen-Image-Edit 2509; prompts of {base.num_text_tokens} tokens as cached")
    without = base_of(config(*data_overrides(world), "data.cache=elsewhere"))
    assert without.note.endswith("Qwen-Image-Edit 2509; length of prompts assumed: there is no cache yet")
    assert without.num_text_tokens is None
    found = as_json(capsys, *data_overrides(world))
    assert found["tokens"] == {"target": 16, "mask": 16, "text": base.num_text_tokens, "holed": 0}


def test_ranks_that_may_grow_are_counted_as_if_all_had(capsys):
    growing = ["adapter.growth={}", "adapter.kind=lora"]
    found, fixed = as_json(capsys, *growing), as_json(capsys, "adapter.kind=lora")
    assert found["does_grow"]
    assert found["num_trained"] == fixed["num_trained"]
    text = re.sub(r"\s+", " ", told(capsys, *growing))
    assert re.search(r"; up to \S+ [MB] are trained, if all ranks grow to the largest", text)
    text = told(capsys, *growing, "adapter.growth.rank_budget=715", code=78)
    assert "adapter.growth.rank_budget: 715 ranks do not suffice for 716 adapted linears of start_rank 1" in text


@pytest.mark.parametrize(
    ("objective", "num", "words"),
    [
        (
            "{kind: dual, completion_fraction: 0.25}",
            2,
            "1984 tokens (image 576, mask 576, image with a hole 576, text 256) in 25% of the steps, else 1408; on "
            "average",
        ),
        (
            "{kind: dual, adapters: [completion]}",
            1,
            "1984 tokens (image 576, mask 576, image with a hole 576, text 256);",
        ),
        ("{kind: dual, adapters: [synthesis]}", 1, "1408 tokens (image 576, mask 576, text 256);"),
    ],
)
def test_two_adapters_and_the_image_with_a_hole_are_counted(capsys, objective, num, words):
    """Not more than the larger sample needs, and in time what lies between the two."""
    dual = [f"objective={objective}", "data.holes={}"]
    found, plain = as_json(capsys, *dual), as_json(capsys)
    assert (found["num_adapters"], found["num_trained"]) == (num, num * plain["num_trained"])
    share = found["completion_share"]
    alone = as_json(capsys, "objective={kind: dual, adapters: [completion]}", "data.holes={}")
    for name in ("forward", "backward", "recompute"):
        mean = (1 - share) * plain["step_flops"][name] + share * alone["step_flops"][name]
        assert found["step_flops"][name] == pytest.approx(mean)
    assert found["forward_flops"] == pytest.approx(
        (1 - share) * plain["forward_flops"] + share * alone["forward_flops"]
    )
    larger = alone if share else plain
    for one, other in zip(found["choices"], larger["choices"], strict=True):
        assert one["memory"]["activations"] == other["memory"]["activations"]
    # Gradients are sent of the adapter that a step trains, its update is gathered of both.
    asked = [*dual, "--gpus", "8", "global_batch_size=32"]
    sent, of_one = as_json(capsys, *asked)["traffic"], as_json(capsys, *asked[2:])["traffic"]
    assert sent["gradients_per_micro_step"] == of_one["gradients_per_micro_step"]
    assert sent["adapter_per_step"] == num * of_one["adapter_per_step"]
    text = re.sub(r"\s+", " ", told(capsys, *dual))
    assert words in text
    assert ("in 2 adapters, of which each step trains one" in text) == (num == 2)


def test_a_dry_run_of_training_tells_the_memory_of_each_mode(world, capsys):
    arguments = [*data_overrides(world), "run=run", "global_batch_size=4"]
    for mode, expected in {
        "processes=2": r"sharding: auto, which takes the first that fits of replicated \d\.\d, zero3 \d\.\d GB per GPU",
        "sharding=replicated": r"sharding: as set: replicated \d\.\d GB per GPU \(estimate\)",
        "sharding=zero3": r"sharding: as set: zero3 \d\.\d GB per GPU",
        "sharding=zero3_hpz": r"sharding: as set: zero3 \d\.\d GB per GPU",
    }.items():
        assert exit_code(["train", *arguments, mode, "--dry-run"]) == 0
        assert re.search(expected, capsys.readouterr().out), mode


def test_a_network_from_scratch_is_not_planned_for_and_the_command_says_so(capsys):
    problem = told(capsys, str(ROOT / "configs/train/spade.yaml"), code=78)
    assert problem.startswith(
        "ccmdist: objective.kind: spade is not planned for, only adapters on Qwen-Image-Edit are; "
    )
