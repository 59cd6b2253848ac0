"""The proof of a synthetic set finds what was planted: a gap, a duplicate, a stranger, a changed sample."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ccmdist.config.loading import resolved
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.reader import read_split
from ccmdist.data.triple import mask_sha256
from ccmdist.data.views import views
from ccmdist.data.writer import write_shard
from ccmdist.errors import ShardError
from ccmdist.jobs.synthesize import describe
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.verify import verify_against_plan


@pytest.fixture
def planned(sources, config, plan_of, tmp_path):
    """A plan and the samples that fit it, shard by shard; their images are grey, for nobody looks at them here."""
    plan = plan_of(config())
    masks = {view.key: view for t in read_split(sources / "shards", "test") for view in views(t, 64, (), "")}
    samples = []
    for number, batch in enumerate(plan.batches):
        for request in batch.requests:
            source = masks[request.source_key]
            provenance = plan.provenance(number, request, mask_sha256(source.nerve_mask))
            meta = replace(source.meta, source="synthetic", labels={}, provenance=provenance)
            samples.append(replace(source, key=request.key, meta=meta))
    SyntheticSet(tmp_path / "out", plan).accept()
    return [samples[:4], samples[4:8], samples[8:]]


@pytest.fixture
def write(tmp_path):
    """Write samples as the set of the plan, with a manifest that fits them."""

    def write(shards, kind="synthetic"):
        folder = tmp_path / "out"
        entries = [write_shard(folder, f"test-{n:06d}.tar", "test", samples) for n, samples in enumerate(shards)]
        commit_manifest(folder, kind, entries)
        return folder

    return write


def problem_of(folder):
    with pytest.raises(ShardError) as problem:
        verify_against_plan(folder)
    assert problem.value.remedy == "draw the set anew in another folder"
    return problem.value.message


def test_a_set_that_fits_its_plan_passes(planned, write):
    folder = write(planned)
    assert verify_against_plan(folder).startswith(f"{folder}: all 10 images of plan ")
    assert len(read_manifest(folder).shards) == 3


def test_a_gap_is_named(planned, write):
    first, second, third = planned
    message = problem_of(write([first, second[1:], third]))
    assert message.endswith(f"1 samples are not as in the plan\n  {second[0].key} of batch 2 is missing")


def test_a_missing_shard_is_a_gap(planned, write):
    message = problem_of(write(planned[:2]))
    assert "2 samples are not as in the plan" in message
    assert message.count("of batch 4 is missing") == 2


def test_a_duplicate_is_named_with_both_shards(planned, write):
    first, second, third = planned
    message = problem_of(write([first, second, [*third, first[1]]]))
    assert message.endswith(f"test-000002.tar: {first[1].key} is in test-000000.tar too")
    assert "1 samples are not" in message


def test_a_stranger_is_named(planned, write):
    first, second, third = planned
    stranger = replace(third[0], key="k9-0000")
    message = problem_of(write([first, second, [*third, stranger]]))
    assert message.endswith("test-000002.tar: k9-0000 is not in the plan")


@pytest.mark.parametrize(
    ("name", "value"), [("adapter_digest", "f" * 64), ("plan_digest", "0" * 64), ("image_number", 7), ("extra", 1)]
)
def test_a_sample_of_another_plan_is_named(planned, write, name, value):
    first, second, third = planned
    sample = third[0]
    meta = replace(sample.meta, provenance=sample.meta.provenance | {name: value})
    message = problem_of(write([first, second, [replace(sample, meta=meta), third[1]]]))
    assert f"{sample.key} provenance {name} is {value!r}, the plan has" in message


def test_another_mask_under_the_same_key_is_named(planned, write):
    first, second, third = planned
    nerve_mask = third[0].nerve_mask.copy()
    nerve_mask[-1, -1] ^= True
    message = problem_of(write([first, second, [replace(third[0], nerve_mask=nerve_mask), third[1]]]))
    assert f"{third[0].key} provenance mask_sha256 is" in message


def test_exchanged_samples_are_named(planned, write):
    first, second, third = planned
    a, b = third
    exchanged = [replace(a, key=b.key), replace(b, key=a.key)]
    assert "2 samples are not as in the plan" in problem_of(write([first, second, exchanged]))


def test_another_group_than_planned_is_named(planned, write):
    first, second, third = planned
    other = "Control" if third[0].meta.clinical_group != "Control" else "T1DPN"
    changed = replace(third[0], meta=replace(third[0].meta, clinical_group=other))
    message = problem_of(write([first, second, [changed, third[1]]]))
    assert f"{third[0].key} has another subject or clinical group than in the plan" in message


def test_many_problems_are_told_in_part(planned, write):
    write_nothing_planned = [[replace(planned[0][0], key=f"x{n}") for n in range(3)]]
    message = problem_of(write(write_nothing_planned))
    assert "13 samples are not as in the plan" in message
    assert message.endswith("... and 3 more")


def test_a_set_of_another_kind_is_refused(planned, write):
    assert "the set is of kind phantom, expected synthetic" in problem_of(write(planned, kind="phantom"))


def test_a_set_without_a_plan_is_refused(sources):
    with pytest.raises(ShardError, match=r"shards/plan\.json: No such file"):
        verify_against_plan(sources / "shards")


def test_a_dry_run_tells_how_much_there_is_to_draw(sources, config):
    told = describe(config(f"adapter={sources}/adapter"))
    assert "10 images of 5 masks in 5 batches and 3 shards; 0 batches are committed" in told
    model = f"Qwen-Image-Edit 2509 at {sources}/model, base in the form that the card of the first worker decides"
    assert f"{model}, adapter {sources}/adapter, 2 denoise steps, guidance 3" in told
    assert f"{sources}/model, base in nf4, adapter none" in describe(config("base=nf4"))


def test_a_dry_run_imports_no_torch(config):
    program = (
        "import sys; from ccmdist.config.synthesize import SynthesizeConfig\n"
        "from ccmdist.jobs.synthesize import describe\n"
        "describe(SynthesizeConfig.model_validate_json(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(resolved(config()))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
