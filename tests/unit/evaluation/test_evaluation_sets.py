"""Which sets may be compared: those that cannot are told of before anything is measured."""

import re
from dataclasses import replace

import pytest

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.reader import read_split
from ccmdist.data.writer import write_set
from ccmdist.errors import ConfigError, EvaluationError
from ccmdist.evaluation.comparison import compare, units
from tests.unit.evaluation.resembling_sets import config_of, drawn, provenance


def test_sets_on_the_wrong_side_are_refused(sets, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"real: .*close is a synthetic set, expected real frames or phantoms; name"
    ):
        compare(config_of(sets, tmp_path, f"real={sets / 'close'}"))
    with pytest.raises(
        EvaluationError, match=r"synthetic.far: .*real is a phantom set, expected one drawn by a model; name"
    ):
        compare(config_of(sets, tmp_path, f"synthetic.far={sets / 'real'}"))


def test_one_set_under_two_names_is_refused(sets, tmp_path):
    with pytest.raises(EvaluationError, match=r"synthetic.close and synthetic.far hold the same images; name each"):
        compare(config_of(sets, tmp_path, f"synthetic.far={sets / 'close'}"))


def test_pixels_of_another_size_are_told_before_anything_is_measured(sets, tmp_path):
    triple = next(read_split(sets / "real", "test"))
    wide = replace(triple, meta=replace(triple.meta, um_per_px=2.0))
    write_set(tmp_path / "wide", "synthetic", [drawn(wide, triple.image, provenance(triple, "d" * 64))], 16)
    config = config_of(sets, tmp_path / "report", f"synthetic.far={tmp_path / 'wide'}")
    with pytest.raises(EvaluationError, match=r"synthetic.far: sample .* has 2.0000 um per px, the real frame of its"):
        units(config)
    assert not config.out.exists()


def test_settings_that_name_sets_strangely_are_refused(sets):
    more = [f"synthetic.close={sets / 'close'}"]
    for override, told in {
        f"out={sets / 'real'}": "is the folder of real; the report needs one of its own",
        f"synthetic.a b={sets / 'far'}": "'a b' is no name for a set, expected letters, digits, _ and -",
        f"synthetic={sets / 'far'}": f"is a mapping of names to folders; write synthetic.NAME={sets / 'far'}",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(told)):
            load(EvaluateConfig, [], [f"real={sets / 'real'}", f"out={sets / 'r'}", *more, override])


def test_a_set_that_is_not_there_is_named_with_the_command_that_makes_it(sets, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"synthetic.far: .*nowhere holds no shard set .*; `ccmdist synthesize` makes one"
    ):
        compare(config_of(sets, tmp_path, f"synthetic.far={sets / 'nowhere'}"))


def test_an_empty_split_is_named_with_those_that_are_not(sets, tmp_path):
    with pytest.raises(EvaluationError, match=r"real: .*has no samples in split val; set split to one of: train, test"):
        compare(config_of(sets, tmp_path, "split=val"))


def test_sets_of_two_sizes_are_refused_and_larger_real_frames_are_scaled(sets, tmp_path):
    triples = [t for _, t in zip(range(4), read_split(sets / "real", "test"), strict=False)]

    def small(triple):
        meta = replace(triple.meta, um_per_px=2 * triple.meta.um_per_px)
        shrunk = replace(triple, nerve_mask=triple.nerve_mask[::2, ::2], meta=meta)
        return drawn(shrunk, triple.image[::2, ::2], provenance(triple, "d" * 64))

    write_set(tmp_path / "small", "synthetic", map(small, triples), 16)
    with pytest.raises(EvaluationError, match=r"synthetic sets differ in size: close 96x96 px, far 48x48 px; evaluate"):
        compare(config_of(sets, tmp_path / "a", f"synthetic.far={tmp_path / 'small'}"))
    write_set(tmp_path / "few", "synthetic", map(small, triples[:3]), 16)
    both = [f"synthetic.close={tmp_path / 'small'}", f"synthetic.far={tmp_path / 'few'}"]
    found = compare(config_of(sets, tmp_path / "b", *both))
    assert found.shape == (48, 48)
    assert found.sets[0].fidelity.measure("ssim").num_images == 4
