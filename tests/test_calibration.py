"""Intervals hold what they promise: on simulated metrics whose truth is known, and where labels are shuffled."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasl_lab.alignment.calibration import (
    GRID,
    WORLDS,
    cells_of,
    components,
    coverage_grid,
    decisions,
    needed,
    null_difference,
    null_grid,
    shuffled_difference,
    simulated,
    within_margin,
)
from tasl_lab.alignment.intervals import MARGINS, crossed_bounds, pseudo_values, verdict
from tasl_lab.core import rng
from tasl_lab.tasks.scores import Scores, auprc, auroc

RESULTS = Path(__file__).parent.parent / "nbs" / "experiments" / "results"


def luck(share, n): return 2.5 * np.sqrt(share * (1 - share) / n)


# --- quick ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", WORLDS)
def test_most_intervals_hold_the_truth(world):
    n = 100 if "a" == world[0] else 800
    found = coverage_grid([world], (20,), [(.5, 1)], n=n, seeds=(3, 5))
    held = found["covered, logit"].fillna(found.covered)  # an endless metric needs no logit
    assert held.min() >= .92 - luck(.92, n) and (held >= found.covered - luck(.05, n)).all()
    assert (found.bias.abs() < found.deviation).all()


def test_an_interval_of_ninety_percent_holds_less():
    "A check that can fail must see the difference between two levels."
    wide, narrow = (coverage_grid(["dice"], (20,), [(1, 1)], n=800, seeds=(5,), level=level).covered[0] for level in (.95, .7))
    assert narrow < .8 < .9 < wide


def test_a_wrong_truth_is_noticed():
    cells = simulated("dice", 10, 60, .5, 1, n=200)
    mean, half, *_ = crossed_bounds(cells)
    assert (np.abs(mean - (WORLDS["dice"].truth(.5, 1) + .1)) <= half).mean() < .5


def test_cells_are_those_of_scores():
    "The simulated cells take the way of the matrix: the same numbers as from a `Scores` with the same pictures."
    g = rng("as scores", 0)
    size = g.integers(1, 5, 15)
    y, p = g.random((15, 4)) < .4, g.random((2, 15, 4))
    there = np.arange(4) < size[:, None]
    group = np.array([f"p{i:02d}" for i in range(15)])[np.nonzero(there)[0]]
    for metric, name in ((auroc, "auroc"), (auprc, "auprc")):
        for ours, q in zip(cells_of(metric, p, y, size), p):
            q = q[there]
            s = Scores("classification:x", name, group, np.arange(len(q)), {"prob": np.stack([1 - q, q], 1), "y": y[there].astype(int)}, ["no", "yes"])
            theirs = pseudo_values(lambda w, s=s: s.per_class(w.astype(float))[:, 1], s.groups, vectorised=True, recenter=True)
            assert np.allclose(ours, theirs)


def test_words_are_those_of_verdict():
    diff = null_difference("gaussian", 3, 12, 1, 1, n=120) * .05 + .03
    words = pd.Series([verdict(d, MARGINS["dice"]).outcome for d in diff]).value_counts(normalize=True)
    assert np.allclose(decisions(diff, MARGINS["dice"]), words.reindex(["better", "worse", "equivalent", "undecided"], fill_value=0))


def test_shuffled_labels_claim_no_more_than_five_percent():
    diff = shuffled_difference(3, 20, n=300)
    said = decisions(diff, .02)
    assert said.better + said.worse <= .05 + luck(.05, 300)


@pytest.mark.parametrize("world", ("gaussian", "dice"))
def test_two_arms_alike_are_seldom_told_apart(world):
    diff = null_difference(world, 3, 20, 1, 1, n=1000)
    margin = 6 * float(diff.mean((1, 2)).std())  # wide enough for an interval to lie within
    said = decisions(diff, margin)
    assert said.better + said.worse <= .05 + luck(.05, 1000) and within_margin(diff, margin) > .8
    assert .02 < within_margin(diff + margin, margin) <= .05 + luck(.05, 1000)


def test_power_is_what_simulation_finds():
    sds, g = {"seed": .01, "group": .05, "rest": .04}, rng("power", 0)
    table = needed(sds, .02, seeds=(2, 5), groups=(15, 80)).set_index(["seeds", "groups"])
    for S, G in table.index:
        cells = .02 + sum(sds[k] * g.standard_normal((3000, *shape)) for k, shape in (("seed", (S, 1)), ("group", (1, G)), ("rest", (S, G))))
        mean, half, *_ = crossed_bounds(cells)
        assert abs(table.power[S, G] - (np.abs(mean) > half).mean()) < .035
        assert abs(table["half width"][S, G] / half.mean() - 1) < .04


def test_needed_reads_deviations_from_cells():
    g = rng("needed", 0)
    cells = .03 + .02 * g.standard_normal((40, 1)) + .06 * g.standard_normal(400) + .05 * g.standard_normal((40, 400))
    assert np.allclose(list(components(cells).values()), [.02, .06, .05], rtol=.3)
    own, margin = needed(cells, seeds=(5,), groups=(40,)), needed(cells, .5 * cells.mean(), seeds=(5,), groups=(40,))
    assert own.power[0] > margin.power[0] and np.isclose(own["half width"][0], margin["half width"][0], rtol=.05)


def test_the_recorded_grid_is_whole():
    "The recorded run holds every point of the grid, and what was found."
    table = pd.read_parquet(RESULTS / "calibration.parquet")
    assert set(table.world) == set(WORLDS) and set(zip(table["seed sd"], table["group sd"])) == set(GRID)
    assert set(table.seeds) == {3, 5, 10} and set(table.groups) == {20, 60} and table.n.min() >= 2000
    assert len(table) == len(WORLDS) * len(GRID) * 6 and np.allclose(table.covered + table.below + table.above, 1)


# --- full -----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(): return coverage_grid(n=2000)


@pytest.mark.full
def test_the_recorded_grid_comes_again(whole):
    recorded = pd.read_parquet(RESULTS / "calibration.parquet")
    both = whole.merge(recorded, on=["world", "groups", "seed sd", "group sd", "seeds"], suffixes=("", " recorded"))
    assert len(both) == len(whole) and np.allclose(both.covered, both["covered recorded"], atol=.002)


@pytest.mark.full
def test_gaussian_intervals_are_calibrated(whole):
    found = whole[whole.world == "gaussian"]
    assert found.covered.min() >= .92 and .93 <= found.covered.mean() <= .97


@pytest.mark.full
def test_the_interval_that_is_shown_is_calibrated(whole):
    "Of bounded metrics the cautious bound on the logit scale."
    shown = whole["covered by bound, logit"].fillna(whole.covered)
    assert shown.min() >= .92 - luck(.92, 2000) and .93 <= shown.mean() <= .97
    assert whole[whole.world != "gaussian"].covered.min() < .9     # what it mends


@pytest.mark.full
def test_false_claims_stay_at_their_rate():
    table = null_grid(n=2000)
    assert table.claimed.mean() <= .055 and table.claimed.max() <= .08 + luck(.08, 2000)
    shuffled = table[table.world.str.startswith("shuffled")]
    assert shuffled.claimed.max() <= .05 + luck(.05, 2000) and table["equivalent at the margin"].max() <= .08 + luck(.08, 2000)
