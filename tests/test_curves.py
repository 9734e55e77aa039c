"""Curves: planted truths come back, and what is not there is not found."""
from types import SimpleNamespace

import numpy as np
import pytest

from tasl_lab.alignment.curves import (
    by_steps,
    joint_noise,
    label_curve,
    saturating_fit,
    saturating_fits,
    scale_cells,
    scale_curve,
    slope_cells,
    trend,
    trend_table,
    worth_of,
)
from tasl_lab.core import InputError, rng

LABELS = (20, 40, 80, 160)
AMOUNTS = np.array([100, 200, 400, 800, 1600, 3200.])


def drawn(g, means, seeds=5, groups=40, noise=.05, seed_noise=.02, group_noise=.05):
    "Cells (B, S, G) round means (B,), with seeds and groups that differ from budget to budget too."
    B = len(means)
    return (np.asarray(means, float)[:, None, None] + group_noise * g.standard_normal((B, 1, groups)) + seed_noise * g.standard_normal((B, seeds, 1))
            + noise * g.standard_normal((B, seeds, groups)))


def matrix(truth, labels=LABELS, steps=150, seeds=4, groups=30, name="made up", tested=None):
    "What `Results` offers; `truth(arm, labels)` is the mean of an arm."
    g, arms = rng("test curves", name, steps), ["simclr", "masked", "random", "supervised"]
    shared = {n: .1 * g.standard_normal(groups) for n in labels}
    cells = {(a, n): truth(a, n) + shared[n] + .03 * g.standard_normal((seeds, groups)) for a in [*arms, "simclr again"] for n in labels}
    score = SimpleNamespace(metric="auroc", groups=np.arange(groups).astype(str) if tested is None else tested)
    return SimpleNamespace(cells=lambda a, t, n: cells[a, n], scores=lambda a, t, n: {0: score}, tasks=["classification:class"],
                           arms=[*arms, "simclr again"], metric=lambda t: "auroc", record={"data": name}, folder=name,
                           config=SimpleNamespace(labels=list(labels), steps=steps, batch=96, seeds=seeds))


# ---------- labels ----------

def test_the_slope_is_least_squares_in_every_cell():
    gains = drawn(rng("slope"), [.3, .2, .15, .1])
    slope = slope_cells(LABELS, gains)
    assert slope.shape == (5, 40) and np.isclose(slope[2, 7], np.polyfit(np.log2(LABELS), gains[:, 2, 7], 1)[0])
    assert np.allclose(slope_cells(LABELS, np.log2(np.array(LABELS))[:, None, None] * -.04 * np.ones((4, 2, 3))), -.04)
    for bad in ((20,), (20, 20, 40, 80), (20, 40, 80)):
        with pytest.raises(InputError, match="label budgets"): slope_cells(bad, gains)


def test_a_planted_trend_is_found_and_covered():
    g, found = rng("planted"), []
    for _ in range(100): found.append(trend(LABELS, drawn(g, .2 - .03 * np.arange(4))))
    assert np.mean([f["outcome"] == "shrinks" for f in found]) > .85
    assert np.mean([f["low"] < -.03 < f["high"] for f in found]) >= .9
    assert trend(LABELS, drawn(g, .1 + .05 * np.arange(4)))["outcome"] == "grows"


def test_without_a_trend_the_level_is_held():
    g = rng("level")
    wrong = np.mean([trend(LABELS, drawn(g, [.1] * 4))["outcome"] != "undecided" for _ in range(300)])
    assert wrong < .09, wrong  # nominal .05, three standard errors above


def test_a_fall_with_a_rise_in_it_turns():
    found = trend(LABELS, drawn(rng("turn"), [.4, .05, .25, .0], noise=.02, group_noise=.02))
    assert found["outcome"] == "turns" and found["rises"] == ["40 to 80"]


def test_the_table_corrects_for_its_rows():
    table = trend_table(matrix(lambda a, n: {"simclr": .2 - .03 * np.log2(n / 20)}.get(a, 0.)))
    assert table.arm.tolist() == ["simclr", "masked"] and table.outcome.tolist() == ["shrinks", "undecided"]
    assert (table.p_holm >= table.p).all() and table.p_holm[0] == min(1, 2 * table.p[0])


def test_the_label_curve_is_paired():
    "Patients that differ by .1 are shared by both arms: the interval of the difference does not see them."
    table = label_curve(matrix(lambda a, n: {"simclr": .1, "random": -.2}.get(a, 0.))).set_index(["arm", "labels"])
    row = table.loc[("simclr", 20)]
    assert row.vs_supervised_low < .1 < row.vs_supervised_high and row.vs_supervised_high - row.vs_supervised_low < .6 * (row.high - row.low)
    assert row.vs_random_low < .3 < row.vs_random_high and np.isnan(table.loc[("random", 20)].vs_random) and row.verdict_supervised == "better"
    assert np.isclose(row.vs_random - row.vs_supervised, table.loc[("supervised", 20)].vs_random)


# ---------- the fit ----------

@pytest.mark.parametrize("top, start, scale", [(.3, 0., 500), (.9, .55, 150), (.2, .4, 1000)])
def test_known_parameters_come_back(top, start, scale):
    y = top - (top - start) * np.exp(-AMOUNTS / scale)
    for known in (None, start):
        found = saturating_fit(AMOUNTS, y, se=np.full(6, .01), start=known, draws=200)
        assert np.allclose([found.top, found.start, found.scale], [top, start, scale], rtol=1e-3)
        assert np.allclose(found.value(AMOUNTS), y, atol=1e-6) and found.misfit > .9
        assert np.isclose(found.reach(found.value(700.)), 700)


@pytest.mark.parametrize("given", [True, False])
def test_intervals_cover(given):
    "With known standard errors, and with errors taken from the residuals of six points."
    g, se, inside = rng("cover", given), np.full(6, .01), []
    y = .3 * (1 - np.exp(-AMOUNTS / 500))
    for k in range(100):
        found = saturating_fit(AMOUNTS, y + se * g.standard_normal(6), se=se if given else None, start=0., draws=200, seed=k)
        inside.append([found.interval(n)[0] < v < found.interval(n)[1] for n, v in (("top", .3), ("scale", 500))])
    assert (np.mean(inside, 0) > .88).all(), np.mean(inside, 0)


def test_the_fit_agrees_with_scipy():
    from scipy.optimize import curve_fit
    y = .3 * (1 - np.exp(-AMOUNTS / 500)) + .01 * rng("scipy").standard_normal(6)
    se = np.linspace(.005, .02, 6)
    expected, _ = curve_fit(lambda x, top, start, scale: top - (top - start) * np.exp(-x / scale), AMOUNTS, y, (.3, 0., 500.), sigma=se)
    found = saturating_fit(AMOUNTS, y, se=se, draws=50)
    assert np.allclose([found.top, found.start, found.scale], expected, rtol=1e-3, atol=1e-4)


def test_what_does_not_level_off_says_so():
    line = saturating_fit(AMOUNTS, AMOUNTS * 1e-4, se=np.full(6, .01), start=0., draws=300)
    assert not line.levels_off and saturating_fit(AMOUNTS, .3 * (1 - np.exp(-AMOUNTS / 500)), se=np.full(6, .01), start=0., draws=300).levels_off
    low, high = line.band([200, 3200])
    assert (low < line.value([200, 3200])).all() and (line.value([200, 3200]) < high).all()


def test_a_wrong_form_shows_in_its_misfit():
    g, se = rng("misfit"), np.full(6, .005)
    y = .3 * (1 - np.exp(-AMOUNTS / 500))
    right = [saturating_fit(AMOUNTS, y + se * g.standard_normal(6), se=se, start=0., draws=200, seed=k).misfit for k in range(60)]
    assert np.mean(np.array(right) < .05) < .15 and np.mean(right) > .3
    assert saturating_fit(AMOUNTS, np.array([.1, .3, .1, .3, .1, .3]), se=se, start=0., draws=200).misfit == 0


@pytest.mark.parametrize("x, y, said", [
    ([100, 100, 200], [1, 2, 3], "different amounts"), ([100, 200], [1, 2, 3], "as many"), ([-1, 2, 3], [1, 2, 3], "negative"),
    ([1, 2, 3], [1, np.nan, 3], "finite"), ([1, 2, 3], [1, 2, 3], "no residuals")])
def test_what_a_fit_refuses(x, y, said):
    with pytest.raises(InputError, match=said): saturating_fit(x, y)


# ---------- more data ----------

def curves(g, **truth):
    patients, seeds = .05 * g.standard_normal((1, 1, 60)), .005 * g.standard_normal((1, 5, 1))
    noise = lambda: .02 * g.standard_normal((6, 5, 60))
    return {n: top * (1 - np.exp(-AMOUNTS / scale))[:, None, None] + patients + seeds + noise() for n, (top, scale) in truth.items()}


def test_joint_noise_has_the_covariance_of_crossed_means():
    "Two points that share their patients have errors that go together."
    g = rng("joint")
    cells = .1 * g.standard_normal((1, 1, 50)) + .01 * g.standard_normal((2, 6, 50))
    noise = joint_noise(cells, 4000)
    assert np.corrcoef(noise.T)[0, 1] > .95 and abs(noise.std() / (cells.mean((0, 1)).std() / 50**.5) - 1) < .15
    with pytest.raises(InputError, match="no spread"): joint_noise(cells[:, :1, :1], 10)


def test_what_aligned_data_is_worth():
    covered = []
    for k in range(12):
        fits = saturating_fits(AMOUNTS, curves(rng("worth", k), aligned=(.3, 300), generic=(.3, 900), poor=(.15, 300)), draws=300, seed=k)
        found = worth_of(fits["aligned"], fits["generic"], 400)
        covered.append(found["outcome"] == "reached" and found["low"] < 1200 < found["high"])
        never = worth_of(fits["aligned"], fits["poor"], 400)
        assert never["outcome"] == "never within the range" and np.isinf(never["worth"])
        back = worth_of(fits["generic"], fits["aligned"], 1200)
        assert back["high"] < 1200 and abs(back["ratio"] - 1 / 3) < .15
    assert np.mean(covered) >= .8


def test_nothing_is_read_beyond_what_was_measured():
    fits = saturating_fits(AMOUNTS, curves(rng("beyond"), aligned=(.3, 1500), generic=(.3, 4500)), draws=300)
    found = worth_of(fits["aligned"], fits["generic"], 3200)  # the generic one would need 9600
    assert np.isinf(found["worth"]) and found["outcome"] == "never within the range"
    for at in (0, 3300):
        with pytest.raises(InputError, match="within what was measured"): worth_of(fits["aligned"], fits["generic"], at)


# ---------- several matrices ----------

def test_a_scale_curve_from_matrices():
    several = [matrix(lambda a, n, t=t: {"simclr": .2, "masked": .1}.get(a, 0.) * (1 - np.exp(-t / 100)), steps=t) for t in (400, 50, 100, 200)]
    ordered = by_steps(several)
    table = scale_curve(ordered)
    assert list(ordered) == [50, 100, 200, 400] and len(table) == 2 * 4 * 4 and set(table.arm) == {"simclr", "masked"}
    for r in table.to_dict("records"):
        cells = ordered[r["x"]].cells(r["arm"], r["task"], r["labels"]) - ordered[r["x"]].cells("random", r["task"], r["labels"])
        assert np.isclose(r["gain"], cells.mean()) and r["low"] < r["gain"] < r["high"]
    cells = scale_cells(ordered, "simclr", "classification:class", 20)
    assert cells.shape == (4, 4, 30)


def test_real_matrices_are_read(tmp_path):
    "Two tiny matrices of two label budgets: what the curves say is what their cells say."
    from tasl_lab.alignment.intervals import crossed_interval
    from tasl_lab.alignment.matrix import MatrixConfig, Results, run_matrix
    from tasl_lab.data.phantom import phantom
    data, several = phantom(120, size=32, seed=5), []
    for steps in (2, 3):
        config = MatrixConfig.of(objectives=["simclr"], tasks=["classification:class"], labels=[60, 30], seeds=2, draws=1, again=False, steps=steps, batch=16,
                                 finetune_steps=2, ceiling=False)
        several.append(Results(run_matrix(config, data, tmp_path / str(steps), verbose=False)))
    curve, r = label_curve(several[0]).set_index(["arm", "labels"]), several[0]
    assert len(curve) == 3 * 2 and list(trend_table(r).arm) == ["simclr"] and curve.metric.eq("auroc").all()
    mine = crossed_interval(r.cells("simclr", "classification:class", 30) - r.cells("supervised", "classification:class", 30))
    assert np.isclose(curve.loc[("simclr", 30)].vs_supervised, mine.mean) and np.isclose(curve.loc[("simclr", 30)].vs_supervised_low, mine.low)
    scaled = scale_curve(by_steps(several))
    assert scaled.x.tolist() == [2, 3] * 2 and np.isfinite(scaled.gain).all()


def test_matrices_that_do_not_belong_together_are_refused():
    one, other = matrix(lambda a, n: 0.), matrix(lambda a, n: 0., steps=300, tested=np.array(["x"] * 30))
    with pytest.raises(InputError, match="differ in test pictures or seeds"): scale_curve(by_steps([one, other]))
    with pytest.raises(InputError, match="differ in steps"): by_steps([one, one])
