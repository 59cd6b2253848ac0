"""Training with real ZeRO-3 ranks: what is killed, stopped or moved to other ranks ends where the straight run ends."""

import json
import math
import os
import signal

import pytest
import torch

from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.train.checkpoint import committed_paths, sealed
from tests.distributed.small_world import losses, weights

pytestmark = pytest.mark.distributed


def test_a_killed_run_resumes_to_bitwise_the_same_adapter(train_ranks):
    assert train_ranks("straight", 2) == [0, 0]
    folder = train_ranks.folder
    assert train_ranks("killed", 2, fault="sigkill@step:rank=1,step=1")[1] == -9
    assert train_ranks("killed", 2, fault="sigkill@step:rank=1,step=3")[1] == -9
    assert RunDirectory(folder / "killed").exit_code() == 70
    assert train_ranks("killed", 2, fault="sigkill@checkpoint.write:rank=1,step=4")[1] == -9
    assert train_ranks("killed", 2, fault="sigkill@checkpoint.before_rename:rank=0,step=4")[0] == -9
    assert list((folder / "killed" / "checkpoints").glob("step-00000004.tmp-*")), "the drill did not hit a save"
    assert train_ranks("killed", 2) == [0, 0]
    assert RunDirectory(folder / "killed").outcome() == Outcome("done", "all 6 steps are done", 6)
    expected, found = weights(folder / "straight"), weights(folder / "killed")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert losses(folder / "killed") == losses(folder / "straight"), "curves overlap or differ after a resume"
    assert not list((folder / "killed" / "checkpoints").glob("*.tmp-*"))


def lose_rank_1(group):
    """Ends both processes: rank 1 at once, rank 0 with 3 if it understood what had happened."""
    from ccmdist.cluster.process_group import is_lost_connection

    if group.ranks.global_rank == 1:
        os._exit(9)
    try:
        group.maximum([0.0])
    except Exception as error:
        os._exit(3 if is_lost_connection(error) else 4)


def test_a_rank_whose_peer_is_gone_knows_that_it_is_not_its_own_fault(run_ranks):
    run_ranks(lose_rank_1, 2, expect_exit_codes=[3, 9])


def test_one_signalled_rank_stops_all_and_the_next_start_goes_on(train_ranks):
    assert train_ranks("stopped", 2, "checkpoint.every_steps=100", fault="sigusr2@step:rank=1,step=2") == [0, 0]
    run = RunDirectory(train_ranks.folder / "stopped")
    assert run.outcome().state == "requeue"
    assert run.exit_code() == 75
    assert [path.name for path in committed_paths(run.checkpoints)] == ["step-00000003"]
    assert train_ranks("stopped", 2, "checkpoint.every_steps=100") == [0, 0]
    assert run.exit_code() == 0
    assert run.attempts() == [{"first_step": 0, "last_step": 3}, {"first_step": 3, "last_step": 6}]


def stop_rank_1_while_it_loads(rank):
    """Let a signal come before there is anything to commit."""
    from ccmdist.train import loop

    resume = loop.resume

    def stopped(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return resume(*arguments)

    loop.resume = stopped


def test_a_stop_that_comes_while_the_model_is_loaded_costs_no_step_and_no_time(train_ranks):
    assert train_ranks("early", 2, patch=stop_rank_1_while_it_loads) == [0, 0]
    run = RunDirectory(train_ranks.folder / "early")
    assert run.outcome() == Outcome("requeue", "stopped by another rank", 0)
    assert run.attempts() == [{"first_step": 0, "last_step": 0}]
    assert committed_paths(run.checkpoints) == []


def record_keys(rank):
    """Let each rank write down the samples it trains on."""
    from ccmdist.train.objectives.edit import EditObjective

    original = EditObjective.loss

    def loss(self, model, batch):
        with (self.config.run.parent / f"keys-{self.config.run.name}-{rank}").open("a") as file:
            for position, key in zip(batch["positions"], batch["keys"], strict=True):
                file.write(f"{position} {key}\n")
        return original(self, model, batch)

    EditObjective.loss = loss


def sample_order(folder, name):
    lines = [line for path in folder.glob(f"keys-{name}-*") for line in path.read_text().splitlines()]
    return sorted((int(line.split()[0]), line.split()[1]) for line in lines)


def test_other_numbers_of_ranks_follow_the_same_samples_and_the_same_curve(train_ranks):
    folder = train_ranks.folder
    assert train_ranks("alone", 1, patch=record_keys) == [0]
    for world_size, fault in ((2, "sigusr2@step:rank=0,step=1"), (1, "sigusr2@step:rank=0,step=3"), (4, "")):
        assert train_ranks("moved", world_size, fault=fault, patch=record_keys) == [0] * world_size
    assert sample_order(folder, "moved") == sample_order(folder, "alone")
    assert [step for step, _ in losses(folder / "moved")] == [1, 2, 3, 4, 5, 6]
    for (_, moved), (_, alone) in zip(losses(folder / "moved"), losses(folder / "alone"), strict=True):
        assert math.isclose(moved, alone, rel_tol=1e-5)


def test_a_full_disk_costs_one_save_and_too_many_stop_the_run(train_ranks):
    folder = train_ranks.folder
    assert train_ranks("once", 2, fault="enospc@checkpoint.write:rank=1,step=4") == [0, 0]
    assert [path.name for path in committed_paths(folder / "once" / "checkpoints")] == [
        "step-00000002",
        "step-00000006",
    ]
    faults = ";".join(f"enospc@checkpoint.write:rank=1,step={step}" for step in (2, 4))
    codes = train_ranks("twice", 2, "checkpoint.max_failed_saves=2", fault=faults)
    assert codes == [78, 78]
    reason = RunDirectory(folder / "twice").outcome().reason
    assert "step 4 could not be saved" in reason
    assert "No space left on device (2 failed saves in a row)" in reason


def poison_rank_1(rank):
    from ccmdist.train.objectives.edit import EditObjective

    original = EditObjective.loss

    def loss(self, model, batch):
        value = original(self, model, batch)
        return value * math.nan if rank == 1 and batch["step"] in (1, 3, 4) else value

    EditObjective.loss = loss


def test_steps_with_a_loss_that_is_not_finite_are_counted_and_named(train_ranks):
    folder = train_ranks.folder
    assert train_ranks("borne", 2, "max_nonfinite_in_a_row=3", patch=poison_rank_1) == [0, 0]
    assert all(value.isfinite().all() for value in weights(folder / "borne").values())
    assert train_ranks("given-up", 2, "max_nonfinite_in_a_row=2", patch=poison_rank_1) == [78, 78]
    reason = RunDirectory(folder / "given-up").outcome().reason
    assert "step 5: the loss is not finite (samples: " in reason
    assert "2 such steps in a row" in reason


def test_settings_data_and_weights_of_a_run_do_not_change_silently(train_ranks, world):
    folder = train_ranks.folder
    assert train_ranks("a", 1, "num_steps=2") == [0]
    assert train_ranks("a", 1, "num_steps=3") == [78]
    assert train_ranks("a", 1, "num_steps=3", allow=["num_steps"]) == [0]
    manifest = folder / "a" / "checkpoints" / "step-00000003" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed(values | {"base_digest": "0" * 64})))
    assert train_ranks("a", 1, "num_steps=4", allow=["num_steps"]) == [78]
    assert "was trained on base weights 000000000000" in RunDirectory(folder / "a").outcome().reason


def test_a_stop_whose_save_fails_says_what_is_lost_and_does_not_ask_for_ever(train_ranks):
    run = RunDirectory(train_ranks.folder / "lost")
    fault = "sigusr2@step:rank=0,step=0;enospc@checkpoint.write:rank=0,step=1"
    for state in ("requeue", "requeue", "refused"):
        assert train_ranks("lost", 1, "checkpoint.every_steps=100", fault=fault) == [0]
        assert run.outcome().state == state
        assert run.outcome().step == 0
    assert "step 1 could not be saved: 3 attempts in a row ended at step 0" in run.outcome().reason


def test_a_checkpoint_of_another_rank_is_not_cut_to_fit(train_ranks):
    folder = train_ranks.folder
    assert train_ranks("r", 1, "num_steps=2") == [0]
    assert train_ranks("r", 1, "num_steps=2", "adapter.lora_rank=2", allow=["adapter.lora_rank"]) == [78]
    assert "lora_A has shape [4, 128], this run has [2, 128]" in RunDirectory(folder / "r").outcome().reason


def test_curves_that_cannot_be_written_do_not_end_a_run(train_ranks):
    folder = train_ranks.folder / "dark"
    folder.mkdir()
    (folder / "tensorboard").write_text("in the way")
    assert train_ranks("dark", 1, "num_steps=2") == [0]
    assert RunDirectory(folder).outcome().state == "done"
