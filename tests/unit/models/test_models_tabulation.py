"""One file per node holds the table of its ranks: made once, mapped, never one that somebody else has put there."""

import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ccmdist.errors import ModelError
from ccmdist.models import mmdit, tabulation
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.node_folder import alone_on_node, node_folder
from ccmdist.models.tabulation import TableKind, table_for, write_table

CPU = torch.device("cpu")
SIGMAS = torch.tensor([0.9, 0.5, 0.25])


@pytest.fixture
def folder(tiny_models):
    return ModelFolder.open(tiny_models["2511"])


@pytest.fixture
def made(monkeypatch):
    """How often a table was made."""
    calls = []
    original = tabulation.tabulate
    monkeypatch.setattr(tabulation, "tabulate", lambda *a: calls.append(a) or original(*a))
    return calls


def table(folder, sigmas=SIGMAS, dtype=torch.float32, samples_at_once=2, base_digest="base"):
    return table_for(folder, sigmas, dtype, samples_at_once, CPU, base_digest)


def test_a_table_is_made_once_and_found_by_the_next_run(node, folder, made):
    first, again = table(folder), table(folder)
    assert len(made) == 1
    assert torch.equal(first.rows_NR, again.rows_NR)
    assert first.levels_N.tolist() == [0.0, 0.25, 0.5, SIGMAS[0].item()]
    assert first.rows_NR.isfinite().all()
    assert [Path(first.about)] == list(node.glob("modulation-*.safetensors"))
    assert node.stat().st_mode & 0o777 == 0o700
    plain = mmdit.build(folder, torch.float32, None)
    with torch.no_grad():
        expected = plain.transformer_blocks[3].txt_mod(plain.time_text_embed(torch.tensor([0.25]), torch.zeros(1)))
    width = plain.inner_dim
    assert torch.allclose(first.rows_NR[1, 42 * width : 48 * width], expected[0], atol=1e-6)


def test_a_table_with_more_levels_serves_a_run_that_needs_fewer(node, folder, made):
    table(folder)
    assert table(folder, SIGMAS[1:]).levels_N.tolist() == [0.0, 0.25, 0.5, SIGMAS[0].item()]
    assert len(made) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"base_digest": "another"},
        {"dtype": torch.bfloat16},
        {"samples_at_once": 1},
        {"sigmas": torch.tensor([0.9, 0.4])},
    ],
)
def test_a_table_of_something_else_is_not_taken(node, folder, made, other):
    table(folder)
    table(folder, **other)
    assert len(made) == 2
    assert len(list(node.glob("modulation-*.safetensors"))) == 2


def test_one_that_another_library_has_made_is_not_taken(node, folder, made, monkeypatch):
    table(folder)
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    table(folder)
    assert len(made) == 2


def test_one_that_lies_in_the_model_folder_is_taken_wherever_it_was_made(node, tiny_copy, made):
    folder = ModelFolder.open(tiny_copy)
    kind = TableKind("base", "BF16", "64", "torch 1, some card")
    levels_N = tabulation.levels(SIGMAS, torch.bfloat16)
    file = write_table(tiny_copy / "modulation", folder, levels_N, torch.bfloat16, kind, CPU)
    assert table(folder, dtype=torch.bfloat16).about == str(file)
    assert len(made) == 1
    assert not list(node.glob("modulation-*.safetensors"))
    # fp32 is held to the bit: not from another device or shape.
    kind = TableKind("base", "F32", "64", TableKind.of("base", torch.float32, 1, CPU).made_with)
    write_table(tiny_copy / "modulation", folder, tabulation.levels(SIGMAS, torch.float32), torch.float32, kind, CPU)
    assert Path(table(folder).about).parent == node


def test_a_file_that_is_cut_short_is_made_anew(node, folder, made):
    file = Path(table(folder).about)
    os.truncate(file, 1000)
    assert table(folder).rows_NR.isfinite().all()
    assert len(made) == 2


def test_a_file_that_leads_nowhere_is_made_anew(node, folder, made, tiny_copy):
    (tiny_copy / "modulation").mkdir()
    (tiny_copy / "modulation" / "modulation-0123.safetensors").symlink_to("nowhere")
    table(ModelFolder.open(tiny_copy))
    assert len(made) == 1


def test_some_levels_alone_are_those_rows_in_memory(node, folder):
    whole = table(folder)
    some = whole.only(whole.levels_N[1:3])
    assert torch.equal(some.rows_NR, whole.rows_NR[1:3])
    assert torch.equal(some.rows(whole.levels_N[1:3], CPU), whole.rows(whole.levels_N[1:3], CPU))


def test_the_file_is_one_that_safetensors_reads(node, folder):
    file = Path(table(folder, dtype=torch.bfloat16).about)
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["base_digest"] == "base"
        assert stored.get_tensor("rows").dtype == torch.bfloat16
        assert stored.get_tensor("rows").data_ptr() % 16 == 0


def make_one(path, node, queue):
    """A rank of a node."""
    os.environ["CCMDIST_NODE_TMP"] = node
    torch.set_num_threads(1)
    calls, original = [], tabulation.tabulate
    tabulation.tabulate = lambda *a: calls.append(a) or original(*a)
    queue.put((len(calls), table(ModelFolder.open(path)).rows_NR.double().sum().item(), len(calls)))


def test_of_several_ranks_of_a_node_one_makes_it_and_all_have_it(folder, tmp_path, forkserver):
    queue = forkserver.Queue()
    ranks = [forkserver.Process(target=make_one, args=(folder.path, str(tmp_path), queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    told = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(num_made for _, _, num_made in told) == [0, 0, 1]
    assert len({total for _, total, _ in told}) == 1


def test_only_rows_that_are_used_come_into_memory(node, folder):
    import psutil

    sigmas = torch.linspace(0.001, 1, 1000)
    rows_NR = table(folder, sigmas, samples_at_once=100).rows_NR
    fresh = table(folder, sigmas, samples_at_once=100)
    assert rows_NR.nbytes > 20 << 20
    before = psutil.Process().memory_info().rss
    fresh.rows(sigmas[[3, 700]], CPU)
    assert psutil.Process().memory_info().rss - before < 4 << 20


def test_a_folder_that_somebody_else_could_fill_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CCMDIST_NODE_TMP", str(tmp_path))
    ours = tmp_path / f"ccmdist-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    ours.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=r"ccmdist-\d+: is no folder, expected a folder of user \d+; set CCMDIST_NODE_TMP to"
    ):
        node_folder()
    ours.unlink()
    ours.mkdir(mode=0o777)
    assert node_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (tmp_path / "ccmdist-4711").mkdir()
    with pytest.raises(ModelError, match=r"ccmdist-4711: belongs to user \d+, expected a folder of user 4711; set "):
        node_folder()


def test_a_node_without_room_is_refused_with_what_lies_there(node, folder, monkeypatch):
    table(folder)
    usage = shutil.disk_usage(node)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ModelError) as refusal:
        table(folder, samples_at_once=1)
    assert str(refusal.value) == (
        f"{node}: has 0.0 GiB free, expected 0.3 GiB for the table of modulation; earlier ones hold 0.0 GiB there; "
        "remove what is there, set CCMDIST_NODE_TMP to a folder on another disk of this node, or "
        "give a model folder from `ccmdist model convert`, or train with tabulate_modulation=false"
    )


def test_what_a_killed_process_had_begun_is_removed_and_others_are_told(node, folder, caplog, monkeypatch):
    monkeypatch.setattr("ccmdist.models.node_folder.WORTH_TELLING_BYTES", 0)
    table(folder)
    (node / ".modulation-0123.safetensors.tmp-1-2").write_bytes(b"x")
    with caplog.at_level("INFO", logger="ccmdist"):
        table(folder, samples_at_once=1)
    assert not list(node.glob(".modulation-*"))
    assert f"{node}: earlier ones hold 0.0 GiB; remove those that no run needs" in caplog.text


def test_who_waits_says_so(node, monkeypatch, caplog):
    monkeypatch.setattr("ccmdist.models.node_folder.SECONDS_IN_SILENCE", 0.01)
    is_in, may_go = threading.Event(), multiprocessing.get_context("fork").Event()

    def hold():
        with alone_on_node(node, "x", "something"):
            is_in.set()
            may_go.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    is_in.wait(10)
    threading.Timer(0.2, may_go.set).start()
    with caplog.at_level("INFO", logger="ccmdist"), alone_on_node(node, "x", "something"):
        assert "waiting for another process of this node, for it is making something" in caplog.text
    other.join()
