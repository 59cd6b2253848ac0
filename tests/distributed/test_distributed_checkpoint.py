"""The engine's state is saved as slices, committed as a whole, and re-cut for any number of ranks."""

import errno
import json
import os
import re

import pytest
import torch

from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.errors import CheckpointError
from tests.distributed.small_engine import reading, slices

BATCH = 8


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def make_engine(group, *overrides, cut_sets=frozenset()):
    from ccmdist.train.engine import Engine

    config = load(
        TrainConfig,
        [],
        ["run=r", "data.shards=s", "data.model=m", f"global_batch_size={BATCH}", "micro_batch_size=1", *overrides],
    )
    model = small_model()
    model[0].weight.requires_grad_(False)
    sets = {
        "first": {"0.bias": model[0].bias},
        "second": {"2.weight": model[2].weight, "2.bias": model[2].bias},
    }
    return Engine(model, sets, config, group, cut_sets=cut_sets)


def one_step(engine, group, step, active=("first", "second")):
    """The same eight samples of a step, whatever the number of ranks."""
    world, rank = group.ranks.world_size, group.ranks.global_rank
    source = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 5, generator=source), torch.randn(BATCH, 3, generator=source)
    losses = []
    engine.begin_step(frozenset(active), 1e-2)
    for index in range(rank, BATCH, world):
        loss = (engine.module(x[index : index + 1]) - y[index : index + 1]).square().mean()
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    engine.update_average()
    return group.total([sum(losses) / BATCH])[0]


def train_save_train(group, folder, first, last):
    from ccmdist.train.checkpoint import CheckpointStore

    engine = make_engine(group, "optim.ema_decay=0.9")
    store = CheckpointStore(folder, group, keep=2, attempt=0)
    checkpoint = store.newest()
    if checkpoint is not None:
        engine.load(checkpoint.read, checkpoint.manifest["adam_steps"])
    start = checkpoint.step if checkpoint else 0
    assert start == first
    losses = [one_step(engine, group, step) for step in range(start, last)]
    assert store.save(last, engine.local, {"adam_steps": engine.adam_steps()}) == ""
    return losses


def whole_state(folder, step):
    from ccmdist.train.checkpoint import verified

    checkpoint = verified(folder / f"step-{step:08d}")
    quantities = ("weight", "exp_avg", "exp_avg_sq", "average")
    return {(n, q): checkpoint.whole(n, q) for n in checkpoint.manifest["parameters"] for q in quantities}


@pytest.mark.distributed
def test_a_state_is_recut_for_another_number_of_ranks(run_ranks, tmp_path):
    straight = run_ranks(train_save_train, 1, tmp_path / "straight", 0, 6)[0]
    stops = [(2, 0, 2), (1, 2, 4), (3, 4, 6)] if BATCH % 3 == 0 else [(2, 0, 2), (1, 2, 4), (4, 4, 6)]
    losses = []
    for world_size, first, last in stops:
        losses += run_ranks(train_save_train, world_size, tmp_path / "recut", first, last)[0]
    assert losses == pytest.approx(straight, rel=1e-5)
    for name, value in whole_state(tmp_path / "straight", 6).items():
        torch.testing.assert_close(whole_state(tmp_path / "recut", 6)[name], value, rtol=1e-4, atol=1e-6)


def only_the_named_set_moves(group):
    engine = make_engine(group, "optim.weight_decay=0.1")
    one_step(engine, group, 0)
    before = {name: {q: t.clone() for q, t in p.values.items()} for name, p in engine.local.items()}
    one_step(engine, group, 1, active=("first",))
    for name, parameter in engine.local.items():
        for quantity, tensor in parameter.values.items():
            if len(tensor):
                assert torch.equal(tensor, before[name][quantity]) == (name != "0.bias"), (name, quantity)
    return engine.adam_steps() == {"first": 2, "second": 1}


@pytest.mark.distributed
def test_a_set_that_a_step_does_not_name_stays_bit_for_bit(run_ranks):
    assert run_ranks(only_the_named_set_moves, 2) == [True, True]


def a_cut_set_beside_whole_ones(group):
    """Losses with a set whole, and with it cut, before and after each takes over a state of its own."""
    whole, cut = make_engine(group), make_engine(group, cut_sets=frozenset({"second"}))
    losses = []
    for engine in (whole, cut):
        told = [one_step(engine, group, step) for step in range(2)]
        kept, adam_steps = slices(engine), engine.adam_steps()
        told += [one_step(engine, group, step) for step in range(2, 4)]
        engine.load(reading(kept), adam_steps)
        told.append(one_step(engine, group, 2))
        losses.append(told)
    is_there = {name: parameter.numel() > 0 for of in cut.parameter_sets.values() for name, parameter in of.items()}
    assert is_there == {"0.bias": True, "2.weight": False, "2.bias": False}
    assert losses[0][4] == losses[0][2] != losses[0][3]
    return losses


@pytest.mark.distributed
def test_a_set_that_stays_cut_learns_what_a_whole_one_does_bit_for_bit(run_ranks):
    for whole, cut in run_ranks(a_cut_set_beside_whole_ones, 2):
        assert whole == cut


def nonfinite_on_one_rank(group):
    engine = make_engine(group)
    one_step(engine, group, 0)
    before = {name: p.values["weight"].clone() for name, p in engine.local.items()}
    loss = engine.module(torch.ones(1, 5)).sum() * (float("nan") if group.ranks.global_rank == 1 else 1.0)
    engine.begin_step(frozenset({"first", "second"}), 1e-2)
    for _ in range(BATCH // group.ranks.world_size):
        engine.backward(loss * 1.0 if engine.is_last_accumulation else engine.module(torch.ones(1, 5)).sum())
        norm = engine.step()
    same = all(torch.equal(p.values["weight"], before[name]) for name, p in engine.local.items())
    after = one_step(engine, group, 2)
    return same and norm == float("inf") and after == after


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(run_ranks):
    assert run_ranks(nonfinite_on_one_rank, 2) == [True, True]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, forkserver):
    from tests.conftest import _rank

    folder = tmp_path_factory.mktemp("checkpoints")
    for first, last in ((0, 1), (1, 2)):
        child = forkserver.Process(
            target=_rank, args=(train_save_train, 0, 1, str(tmp_path_factory.mktemp("r")), (folder, first, last))
        )
        child.start()
        child.join()
        assert child.exitcode == 0
    return folder


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "empty_manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(two_checkpoints, tmp_path, damage):
    import shutil

    from ccmdist.train.checkpoint import newest_valid, verified

    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    newest = folder / "step-00000002"
    file = newest / "slices-00000.safetensors"
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    else:
        (newest / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="step-00000002"):
        verified(newest)
    assert newest_valid(folder).step == 1


def test_a_checkpoint_that_cannot_be_read_is_broken_unless_it_is_another_users(two_checkpoints, monkeypatch):
    from ccmdist.train import checkpoint

    def failing(number):
        def read(path):
            raise OSError(number, os.strerror(number), str(path))

        return read

    newest = two_checkpoints / "step-00000002"
    monkeypatch.setattr(checkpoint, "sha256_of_file", failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"step-00000002: cannot be read .*Input/output error"):
        checkpoint.verified(newest)
    monkeypatch.setattr(checkpoint, "sha256_of_file", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        checkpoint.newest_valid(two_checkpoints)


def test_a_checkpoint_of_another_version_is_neither_loaded_nor_passed_over(two_checkpoints, tmp_path):
    import shutil

    from ccmdist.train.checkpoint import OtherFormat, newest_valid, sealed

    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    path = folder / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"format_version": 99})))
    with pytest.raises(OtherFormat, match=r"step-00000002: is whole, but of format 99, and this version reads \d"):
        newest_valid(folder)
    assert (folder / "step-00000002").is_dir()


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"format_version": 1}', "3"])
def test_a_manifest_that_says_nothing_is_a_broken_checkpoint(tmp_path, manifest):
    from ccmdist.train.checkpoint import verified

    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        verified(tmp_path)


def test_a_step_that_is_broken_again_gets_another_name(tmp_path):
    from ccmdist.train.checkpoint import _set_aside

    for _ in range(3):
        (tmp_path / "step-00000004").mkdir()
        _set_aside(tmp_path / "step-00000004")
    names = ["step-00000004.broken", "step-00000004.broken-1", "step-00000004.broken-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_slices_can_be_read_by_whom_the_folder_lets(two_checkpoints):
    newest = two_checkpoints / "step-00000002"
    modes = {path.stat().st_mode & 0o777 for path in newest.iterdir()}
    assert modes == {(newest / "manifest.json").stat().st_mode & 0o777}
