"""What the settings name is there and complete before a job waits for it; sizes follow from headers alone."""

import os

from ccmdist.config.data import DataSettings
from ccmdist.data.cache_index import cache_folder, commit_fingerprint, fingerprint
from ccmdist.data.manifest import ShardEntry, commit_manifest
from ccmdist.diagnostics.checks import settings as checks
from ccmdist.diagnostics.checks.adapter_size import checkpoint_bytes, num_values
from ccmdist.models.model_folder import ModelFolder
from tests.unit.diagnostics.doctored import model_folder, one, request, settings

SHARD = "train-000000.tar"


def shard_set(folder):
    folder.mkdir()
    (folder / SHARD).write_bytes(bytes(512))
    entry = ShardEntry(SHARD, "train", 3, 512, "0" * 64, ("a",), {"Control": 3})
    return commit_manifest(folder, "phantom", [entry])


def complete(tmp_path, *overrides):
    model_folder(tmp_path / "model")
    shard_set(tmp_path / "shards")
    return made(tmp_path, *overrides)


def made(tmp_path, *overrides):
    data = [f"data.{name}={tmp_path}/{name}" for name in ("model", "shards", "cache")]
    return request(config=settings(f"run={tmp_path}/run", *data, *overrides))


def found(asked):
    return {finding.what: finding for finding in checks.check(asked)}


def test_a_complete_model_is_told_with_its_version_and_sizes(tmp_path):
    finding = found(complete(tmp_path))["model files"]
    assert finding.state == "OK"
    assert finding.found.startswith("Qwen-Image-Edit 2509, complete: transformer ")


def test_a_weight_file_that_lacks_bytes_is_named(tmp_path):
    asked = complete(tmp_path)
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    findings = found(asked)
    assert findings["model files"].state == "MISS"
    assert findings["model files"].found == f"{file}: the download is not complete ({size - 1} of {size} bytes)"
    assert "hf download Qwen/Qwen-Image-Edit-2509" in findings["model files"].remedy
    assert "cached samples" not in findings  # its name depends on the model


def test_a_torn_header_and_a_missing_tokenizer_are_told(tmp_path):
    asked = complete(tmp_path)
    file = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    os.truncate(file, 20)
    assert found(asked)["model files"].found == f"{file}: is not a complete safetensors file"
    (tmp_path / "model/tokenizer/tokenizer.json").unlink()
    assert found(asked)["model files"].found == f"{tmp_path}/model: tokenizer/tokenizer.json is missing"


def test_a_shard_that_was_copied_in_part_is_named(tmp_path):
    asked = complete(tmp_path)
    assert found(asked)["shard set"].found == "phantom, train 3, val 0, test 0 samples"
    os.truncate(tmp_path / "shards" / SHARD, 100)
    finding = found(asked)["shard set"]
    assert (finding.state, finding.found) == ("MISS", f"{tmp_path}/shards/{SHARD}: has 100 bytes, expected 512")
    assert finding.remedy == f"copy it again, then `ccmdist shards verify {tmp_path}/shards`"


def test_a_cache_that_is_not_filled_comes_with_the_command_that_fills_it(tmp_path):
    asked = complete(tmp_path)
    finding = found(asked)["cached samples"]
    assert finding.state == "MISS"
    assert finding.remedy.startswith("run `ccmdist precompute data.shards=")
    data: DataSettings = asked.config.data
    manifest_digest = checks.read_manifest(data.shards).digest
    wanted = fingerprint(data, manifest_digest, ModelFolder.open(data.model).encoder_identity())
    commit_fingerprint(cache_folder(data, wanted), wanted)
    assert "1 of 1 shards are missing" in found(asked)["cached samples"].found


def test_a_batch_that_does_not_divide_over_the_ranks_is_told_with_one_that_does(tmp_path):
    asked = complete(tmp_path, "global_batch_size=32", "micro_batch_size=4", "processes=3")
    finding = found(asked)["batch"]
    assert finding.state == "MISS"
    assert finding.remedy.startswith("set global_batch_size=36")
    asked = made(tmp_path, "global_batch_size=32", "micro_batch_size=4", "slurm.nodes=2", "slurm.gpus_per_node=4")
    assert found(asked)["batch"].found == "32 samples per step on 8 ranks, 4 at a time"


def test_without_settings_there_is_nothing_to_look_at():
    assert list(checks.check(request())) == []


def test_the_adapter_of_the_20_b_model_is_sized_from_headers(tmp_path):
    """60 blocks of width 3072: 109,486,080 values at rank 16 with magnitudes, of 720 linears (counted with PEFT)."""
    model_folder(tmp_path / "model", num_blocks=60, width=3072)
    config = settings(f"data.model={tmp_path}/model")
    assert num_values(config) == 109_486_080
    plain = settings(f"data.model={tmp_path}/model", "adapter.kind=lora")
    assert num_values(plain) == 109_486_080 - 3_317_760
    assert checkpoint_bytes(config) == 109_486_080 * (12 * 4 + 4)  # three are kept while a fourth is written


def test_two_adapters_take_twice_the_room(tmp_path):
    model_folder(tmp_path / "model", width=8)
    one = settings(f"data.model={tmp_path}/model")
    two = settings(f"data.model={tmp_path}/model", "objective={kind: dual}", "data.holes={}")
    assert checkpoint_bytes(two) == 2 * checkpoint_bytes(one) > 0


def test_only_the_targets_count(tmp_path):
    model_folder(tmp_path / "model", width=8)
    config = settings(f"data.model={tmp_path}/model", "adapter.targets=[attn.to_q]", "adapter.lora_rank=2")
    assert num_values(config) == 2 * (8 + 8) + 8


def test_the_size_is_unknown_without_a_model(tmp_path):
    assert checkpoint_bytes(settings(f"data.model={tmp_path}/none")) == 0


def test_one_problem_does_not_hide_the_others(tmp_path):
    findings = list(checks.check(made(tmp_path, "processes=3")))
    assert [finding.state for finding in findings] == ["MISS", "MISS", "MISS"]
    assert one(findings, "shard set").remedy.startswith("name the folder of a complete set")


def test_folders_that_the_objective_names_are_looked_at(tmp_path):
    shard_set(tmp_path / "shards")
    of_mdf = ("adapter=null", "base=null", "activation_checkpointing=null", "objective.kind=diagnose")
    finding = found(made(tmp_path, *of_mdf, f"objective.mllm={tmp_path}/llm"))["objective's files"]
    assert (finding.state, finding.found) == ("MISS", f"objective.mllm: {tmp_path}/llm is not there")
    assert finding.remedy == "copy it there from a machine with internet, for nothing is fetched here"
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/README.md").write_text("accept the licence first")
    finding = found(made(tmp_path, *of_mdf, f"objective.mllm={tmp_path}/llm"))["objective's files"]
    assert finding.found == f"{tmp_path}/llm: holds no config.json"
    assert finding.remedy.startswith("accept the licence on the model's page, then `hf download")
    assert "objective's files" not in found(made(tmp_path))
