"""The matrix: conditions are weights, draws are nested, a kill loses nothing that was finished, and everything comes back from the folders."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasl_lab.alignment.matrix import (
    AGAIN,
    TUNED,
    Item,
    Matrix,
    MatrixConfig,
    Results,
    cells_table,
    conditions,
    conditions_table,
    contrast,
    items_of,
    run_matrix,
)
from tasl_lab.core import InputError
from tasl_lab.data.phantom import phantom

TINY = MatrixConfig.of(objectives=["simclr", "masked"], labels=[12, 24], seeds=2, draws=3, steps=2, batch=16, finetune_steps=2,
                       tasks=["classification:side", "detection:boxes"], ceiling=False)


def pictures():
    "Known scanners, an unseen one, and pictures without a finding."
    return phantom(120, 32, lesion_share=.6).with_external(phantom(24, 32, seed=7, lesion_share=.6, sites=(("east", .8, .04, 1.),)))


@pytest.fixture(scope="module")
def data(): return pictures()


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    return Results(run_matrix(TINY, data, tmp_path_factory.mktemp("matrix"), verbose=False))


def test_conditions_are_weights_of_the_same_predictions(found, data):
    scores = found.scores("simclr", "detection:boxes", 24)[1]
    where = conditions(data, scores.ids)
    assert list(where) == ["internal", "unseen site", "rare findings"]
    first = found.table.query("arm == 'simclr' and task == 'detection:boxes' and budget == 24 and seed == 1 and draw == 0")
    for name, weight in where.items():
        cell = first[first.condition == name]
        assert cell.cell.mean() == pytest.approx(scores.value(weight=weight))
        assert set(cell.group) == set(scores.groups[weight > 0])
    east = found.table[found.table.condition == "unseen site"].group
    assert east.str.startswith("s7-").all() and not found.table[found.table.condition == "internal"].group.str.startswith("s7-").any()
    rare, has = where["rare findings"], np.array([len(data.boxes[i]) > 0 for i in scores.ids])
    assert set(rare[has & (rare > 0)]) == {.25} and set(rare[~has & (rare > 0)]) == {1.}


def test_label_draws_are_averaged_within_their_seed(found):
    every = found.table.query("arm == 'spark' and task == 'detection:boxes' and budget == 12 and condition == 'internal'")
    assert every.draw.nunique() == 3 and every.groupby(["seed", "group"]).cell.nunique().max() == 3       # other labels, other numbers
    cells = found.cells("spark", "detection:boxes", 12)
    assert cells.shape == (2, every.group.nunique())
    np.testing.assert_allclose(cells[0], every[every.seed == 0].groupby("group").cell.mean())


def test_draws_are_the_same_in_all_arms_and_nested_in_budgets(data):
    items = [i for i in items_of(TINY, data) if i.task is None and i.seed == 1]
    assert {tuple(i.draw(d) for d in range(3)) for i in items} == {(100, 101, 102)}
    assert len({tuple(sorted(data.budget(24, items[0].draw(d)))) for d in range(3)}) == 3
    assert set(data.budget(12, 101)) < set(data.budget(24, 101))


def test_the_same_objective_again_differs_in_its_training_only(found):
    once, twice = Item("simclr", 1, "simclr"), Item("simclr" + AGAIN, 1, "simclr")
    assert once.training != twice.training and once.draw(2) == twice.draw(2)
    a, b = (found.cells(arm, "classification:side", 24) for arm in ("simclr", "simclr" + AGAIN))
    assert a.shape == b.shape and not np.allclose(a, b)
    twins = contrast(found, "simclr" + AGAIN, "simclr")
    assert len(twins) == 4 and (twins.p_holm.fillna(1) >= twins.p.fillna(1)).all()


def test_verdicts_are_corrected(found):
    table = cells_table(found)
    decided = table.verdict_random.isin(["better", "worse"])
    assert (table.p_holm_random[decided] < .05).all() and (table.p_holm_random.dropna() >= table.p_random.dropna()).all()
    wide = conditions_table(found)
    same = wide[(wide.condition == "internal") & (wide.metric != "ece")].reset_index(drop=True)
    pd.testing.assert_series_equal(same["mean"], table["mean"])
    assert set(wide[wide.task == "classification:side"].metric) == {"auroc", "ece"} and wide.groupby("condition").size().nunique() == 1


def test_everything_comes_back_from_the_folders(found, tmp_path):
    matrix = Matrix.from_runs(found.folder.parent)
    pd.testing.assert_frame_equal(matrix.tables["cells"], cells_table(found))
    matrix.save(tmp_path)
    again = pd.read_parquet(tmp_path / "measured.parquet")
    assert len(again) == len(found.table) and {"arm", "seed", "task", "budget", "draw", "condition", "metric", "group", "cell", "data"} == set(again)
    with pytest.raises(InputError, match="matrix.json"): Matrix.from_runs(tmp_path)


RUN = "import sys; sys.path.insert(0, {tests!r}); import test_matrix as t; t.run_matrix(t.TINY, t.pictures(), {out!r}, workers=1)"


def test_a_kill_loses_nothing_that_was_finished(found, data, tmp_path):
    code = RUN.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    finished = lambda: sorted(tmp_path.glob("*/*/item.json"))
    deadline = time.monotonic() + 120
    while len(finished()) < 3 and process.poll() is None and time.monotonic() < deadline: time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in finished()}
    assert 3 <= len(before) < len(items_of(TINY, data))
    partial = Results(next(tmp_path.iterdir()))
    assert len(partial.unfinished) == len(items_of(TINY, data)) - len(partial.items) and len(partial.table)
    whole = Results(run_matrix(TINY, data, tmp_path, verbose=False))
    assert not whole.unfinished and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert cells_table(whole)["mean"].tolist() == pytest.approx(cells_table(found)["mean"].tolist())


def test_last_level_and_fine_tuned_arms(data, tmp_path):
    config = MatrixConfig.of(**TINY.model_dump() | dict(objectives=["masked"], labels=[24], seeds=1, draws=1, again=False, readout="last", finetune=True))
    results = Results(run_matrix(config, data, tmp_path, verbose=False))
    assert results.objectives == ["spark", "spark" + TUNED] and len(list(results.folder.glob("run-*"))) == 1
    cost = [results.cost(arm, "detection:boxes", 24)["pictures"] for arm in ("spark", "supervised", "spark" + TUNED)]
    assert cost[0] + cost[1] == cost[2]
    whole = Results(run_matrix(config.model_copy(update=dict(readout="pyramid")), data, tmp_path, verbose=False))
    a, b = (r.cells("random", "detection:boxes", 24) for r in (results, whole))
    assert a.shape == b.shape and not np.allclose(a, b)
