"""Biomarkers of exact masks against the graph of the phantom's lines, with its crossings resolved.

The constants of the skeleton were chosen on seeds 5000 to 6039; these are others.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from vector_graph import truth_of

from ccmdist.ccm.biomarkers import biomarkers
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_nerves

UM_PER_PX = 400 / 384
SEEDS = range(7000, 7024)


@pytest.fixture(scope="module")
def phantoms():
    return [make_nerves(group, seed) for group in CLINICAL_GROUPS for seed in SEEDS]


@pytest.fixture(scope="module")
def read(phantoms):
    return [biomarkers(nerves.nerve_mask, UM_PER_PX) for nerves in phantoms]


@pytest.mark.parametrize("of", ["lines", "widths"])
def test_biomarkers_of_exact_masks_are_those_of_the_lines(phantoms, read, of):
    truths = [truth_of(nerves, 384, UM_PER_PX, of) for nerves in phantoms]

    def pairs(name):
        return np.array([[getattr(one, name) for one in values] for values in (truths, read)])

    lengths = pairs("cnfl")
    assert np.corrcoef(lengths)[0, 1] >= 0.99
    assert abs(lengths[1].mean() / lengths[0].mean() - 1) <= 0.02
    assert np.corrcoef(pairs("cnfd"))[0, 1] >= 0.95
    assert np.corrcoef(pairs("cnbd"))[0, 1] >= 0.85
    assert np.corrcoef(pairs("ctbd"))[0, 1] >= 0.9


def test_the_chain_code_reads_the_same_phantoms_longer(read):
    ratio = np.mean([one.cnfl_chain_code for one in read]) / np.mean([one.cnfl for one in read])
    assert 1.03 < ratio < 1.08


def judged(paths, of):
    """Paths in a frame of 100 um, each 2 um wide."""
    fibres = [SimpleNamespace(path_um=np.array(path, float), fwhm_um=2.0) for path in paths]
    return truth_of(SimpleNamespace(fibres=fibres), 100, 1.0, of)


@pytest.mark.parametrize("of", ["lines", "widths"])
def test_the_judge_counts_what_is_drawn_by_hand(of):
    """Two lines that cross, a branch on one of them and a loose fibre."""
    truth = judged([[(50, -5), (50, 105)], [(-5, 50), (105, 50)], [(50, 20), (70, 40)], [(80, 60), (95, 80)]], of)
    assert [truth.cnfd, truth.cnbd, truth.ctbd] == pytest.approx([200, 200, 200])
    assert truth.cnfl == pytest.approx((200 + np.hypot(20, 20) + 25) / 1000 / 0.01, rel=1e-3)


@pytest.mark.parametrize(("of", "num"), [("lines", 0), ("widths", 1)])
def test_fibres_that_touch_without_crossing_meet_where_width_counts(of, num):
    truth = judged([[(50, -5), (50, 105)], [(90, 20), (51.5, 50), (90, 80)]], of)
    assert [truth.cnbd, truth.ctbd] == pytest.approx([100 * num, 100 * num])
