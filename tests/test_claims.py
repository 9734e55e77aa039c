"""Preregistration: what was written before stands, what was altered or written late does not."""
import json
import os
import pickle
import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import pytest

from tasl_lab.alignment.claims import judge, made_at, p_of, stamp
from tasl_lab.alignment.intervals import pseudo_values
from tasl_lab.alignment.preregistration import Hypothesis, preregister, preregister_file, read_hypotheses, verify
from tasl_lab.core import InputError, rng
from tasl_lab.tasks.scores import Scores

GIVEN = {"id": "H1", "statement": "a is better", "metric": "auroc", "task": "classification:class", "data": "made up", "a": "simclr", "b": "random",
         "direction": "greater", "margin": .02, "seeds": 3, "budget": {"steps": 150, "batch": 96, "labels": 120}}
BUDGET = GIVEN["budget"]


def hypothesis(**changes): return Hypothesis.of(**GIVEN | changes)


@pytest.fixture
def file(tmp_path): return preregister([GIVEN, GIVEN | {"id": "H2", "direction": "equivalent", "a": "masked"}], tmp_path / "before.json")


# ---------- the file ----------

def test_a_file_comes_back_as_written(file):
    assert verify(file.path) == file and file.hypotheses[0] == hypothesis() and file.hypothesis("H2").direction == "equivalent"
    assert abs((datetime.now(timezone.utc) - file.created).total_seconds()) < 60


def test_the_hash_is_of_the_contents_alone(file):
    "Anyone can check it: sorted keys, no spaces. Another layout of the same JSON is the same file."
    import hashlib
    body = json.loads(file.path.read_text())
    stated = body.pop("sha256")
    assert stated == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
    file.path.write_text(json.dumps(body | {"sha256": stated}))
    assert verify(file.path).hypotheses == file.hypotheses


@pytest.mark.parametrize("edit", [
    lambda b: b["hypotheses"][0].update(margin=.01), lambda b: b["hypotheses"][1].update(direction="greater"), lambda b: b["hypotheses"].pop(),
    lambda b: b.update(created="2020-01-01T00:00:00+00:00"), lambda b: b["hypotheses"][0]["budget"].update(steps=151), lambda b: b.update(library="0")])
def test_any_edit_is_refused(file, edit):
    body = json.loads(file.path.read_text())
    edit(body)
    file.path.write_text(json.dumps(body))
    with pytest.raises(InputError, match="was altered after it was written"): verify(file.path)
    found = stamp(hypothesis(), file, file.created + timedelta(hours=1))
    assert found == "exploratory" and "was altered" in found.reasons[0]


def test_what_is_no_preregistration(tmp_path, file):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="is no preregistration"): verify(tmp_path / "other.json")
    with pytest.raises(InputError, match="no such file"): verify(tmp_path / "none.json")
    with pytest.raises(InputError, match="never overwritten"): preregister([GIVEN], file.path)
    with pytest.raises(InputError, match="'H1' stands there 2 times"): preregister([GIVEN, GIVEN], tmp_path / "twice.json")
    with pytest.raises(InputError, match="no hypothesis"): preregister([], tmp_path / "empty.json")
    assert not (tmp_path / "twice.json").exists()


@pytest.mark.parametrize("missing", ["metric", "margin", "seeds", "budget", "direction"])
def test_nothing_that_binds_may_be_left_open(missing):
    with pytest.raises(InputError, match=missing): Hypothesis.of(**{k: v for k, v in GIVEN.items() if k != missing})
    with pytest.raises(InputError, match="labels"): hypothesis(budget={"steps": 1, "batch": 1})


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"hypotheses": h}])
def test_hypotheses_from_a_file(tmp_path, suffix, wrap):
    import yaml
    source = tmp_path / f"mine.{suffix}"
    source.write_text((json.dumps if suffix == "json" else yaml.safe_dump)(wrap([GIVEN])))
    assert preregister_file(source, tmp_path / "out.json").hypotheses == [hypothesis()]


@pytest.mark.parametrize("text, said", [
    ("a: 1", "holds no list"), ("- [1]", "holds no list"), ("{", "not valid YAML"), ("- {id: X, margins: 1}", "hypothesis 'X'")])
def test_mistakes_in_a_file_are_named(tmp_path, text, said):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=said): read_hypotheses(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match="no such file"): read_hypotheses(tmp_path / "none.yaml")


# ---------- the stamp ----------

def test_only_what_stood_there_before_is_confirmatory(file):
    after = file.created + timedelta(seconds=1)
    for moment in (after, after.isoformat(), after.timestamp()): assert stamp(hypothesis(), file, moment) == "confirmatory"
    assert stamp(hypothesis(), file.path, after).reasons == () and stamp(hypothesis(statement="said otherwise"), file, after) == "confirmatory"
    for moment in (file.created, file.created - timedelta(days=1)):
        late = stamp(hypothesis(), file, moment)
        assert late == "exploratory" and "the first result was begun at" in late.reasons[0]
    with pytest.raises(InputError, match="no time zone"): stamp(hypothesis(), file, datetime(2026, 1, 1))


@pytest.mark.parametrize("change, said", [
    ({"metric": "auprc"}, "metric is 'auprc'"), ({"margin": .05}, "margin is 0.05, preregistered was 0.02"), ({"seeds": 10}, "seeds is 10"),
    ({"budget": BUDGET | {"steps": 300}}, "budget.steps is 300"), ({"direction": "less"}, "direction"), ({"b": "supervised"}, "b is"),
    ({"budget": BUDGET | {"labels": 20}}, "budget.labels"), ({"condition": "unseen site"}, "condition is 'unseen site'"),
    ({"id": "H7"}, "holds no hypothesis 'H7'")])
def test_each_way_of_failing_has_its_reason(file, change, said):
    found = stamp(hypothesis(**change), file, file.created + timedelta(hours=1))
    assert found == "exploratory" and len(found.reasons) == 1 and said in found.reasons[0]


def test_several_reasons_are_all_given(file):
    found = stamp(hypothesis(seeds=9, margin=.1), file, file.created - timedelta(hours=1))
    assert len(found.reasons) == 3 and stamp(hypothesis(), None, 0.).reasons == ("no preregistration was given",)
    assert pickle.loads(pickle.dumps(found)) == found and pickle.loads(pickle.dumps(found)).reasons == found.reasons


@pytest.mark.parametrize("name", ["finetune_steps", "draws"])
def test_what_may_be_left_open_binds_only_where_it_was_stated(tmp_path, name):
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    stated = preregister([GIVEN | {"budget": BUDGET | {name: 200}}], tmp_path / "a.json")
    other = hypothesis(budget=BUDGET | {name: 300})
    assert stamp(other, stated, later) == "exploratory" and stamp(other, preregister([GIVEN], tmp_path / "b.json"), later) == "confirmatory"


# ---------- judging ----------

def results(folder, levels, seeds=3, pictures=60, labels=120, begun=None, **config):
    "What `Results` offers: scores of a two-class task whose separation is the level, and when they were begun."
    items, made = [], {}
    for arm, level in levels.items():
        (folder / arm).mkdir(parents=True, exist_ok=True)
        items.append({"item": {"arm": arm}, "folder": folder / arm, "cost": {}, "begun": begun or time.time()})
        for s in range(seeds):
            g = rng("judged", arm, s)
            y = np.arange(pictures) % 2
            score = 1 / (1 + np.exp(-(level * (2 * y - 1) + g.standard_normal(pictures))))
            made[arm, s] = Scores("classification:class", "auroc", np.array([f"p{i // 2}" for i in range(pictures)]), np.arange(pictures),
                                  {"prob": np.stack([1 - score, score], 1), "y": y}, ["a", "b"])
    def cells(arm, task, n, metric, condition):
        every = [x for (a, s), x in made.items() if a == arm]
        return np.stack([pseudo_values(lambda w, s=s: s.value(weight=w, metric=metric), s.groups, vectorised=True, recenter=True) for s in every])

    c = SimpleNamespace(**{"encoder": "cnn-tiny", "steps": 150, "batch": 96, "labels": [labels], "seeds": seeds, "finetune_steps": 200, "draws": 10} | config)
    scores = lambda arm: [x for (a, s), x in made.items() if a == arm]
    return SimpleNamespace(folder=folder, items=items, config=c, record={"data": "made up"}, tasks=["classification:class"], arms=list(levels), cells=cells,
                           scores=scores)


def test_hypotheses_are_judged_and_stamped(file, tmp_path):
    found = judge(file, results(tmp_path / "r", {"simclr": 2., "spark": .3, "random": .2}, begun=file.created.timestamp() + 60)).set_index("id")
    assert found.outcome["H1"] == "confirmed" and found.stamp.tolist() == ["confirmatory"] * 2 and found["low"]["H1"] > 0
    assert found.p_holm["H1"] == min(1, 2 * found.p["H1"]) and found.outcome["H2"] in ("undecided", "refuted")
    late = judge(file, results(tmp_path / "l", {"simclr": 2., "spark": .3, "random": .2}, begun=file.created.timestamp() - 3))
    assert (late.stamp == "exploratory").all()  # written 2 s after the hypotheses, but begun before them


def test_more_seeds_than_announced_are_exploratory(file, tmp_path):
    found = judge(file, results(tmp_path / "r", {"simclr": 2., "spark": .3, "random": .2}, seeds=5, begun=file.created.timestamp() + 60))
    assert (found.stamp == "exploratory").all() and "seeds is 5, preregistered was 3" in found.reasons[0] and found.outcome[0] == "confirmed"


def test_the_opposite_is_refuted(tmp_path):
    file = preregister([GIVEN | {"direction": "less"}], tmp_path / "f.json")
    assert judge(file, results(tmp_path / "r", {"simclr": 2., "random": .2})).outcome[0] == "refuted"


def test_another_metric_of_the_same_scores_can_be_named(tmp_path):
    file = preregister([GIVEN | {"metric": "auprc"}], tmp_path / "f.json")
    r = results(tmp_path / "r", {"simclr": 2., "random": .2})
    mean = np.mean([a.value(metric="auprc") - b.value(metric="auprc") for a, b in zip(r.scores("simclr"), r.scores("random"))])
    assert np.isclose(judge(file, r)["mean"][0], mean)


def test_what_was_not_run_still_counts(tmp_path):
    "One hypothesis of twenty that was tested alone pays for all twenty."
    file = preregister([GIVEN | {"id": f"H{k}", "data": "made up" if k == 0 else "elsewhere"} for k in range(20)], tmp_path / "f.json")
    found = judge(file, results(tmp_path / "r", {"simclr": 2., "random": .2}))
    assert (found.outcome[1:] == "not tested").all() and np.isclose(found.p_holm[0], min(1, 20 * found.p[0])) and (found.stamp[1:] == "").all()


def test_two_matrices_with_the_same_answer_are_refused(file, tmp_path):
    twice = [results(tmp_path / n, {"simclr": 2., "random": .2}) for n in "rs"]
    with pytest.raises(InputError, match="both have it"): judge(file, twice)


def test_chance_confirms_no_more_than_the_level():
    "Whole families of five true null hypotheses: at least one false confirmation in at most about one of twenty."
    from tasl_lab.alignment.intervals import holm
    g, wrong = rng("families"), 0
    for _ in range(200):
        diffs = [.05 * g.standard_normal((1, 40)) + .02 * g.standard_normal((4, 1)) + .05 * g.standard_normal((4, 40)) for _ in range(5)]
        wrong += bool((holm([p_of(hypothesis(), d) for d in diffs]) < .05).any())
    assert wrong / 200 < .09, wrong


def test_equivalence_needs_a_small_difference_and_few_false_ones():
    alike, g = hypothesis(direction="equivalent"), rng("equivalent")
    cells = lambda mean: mean + .01 * g.standard_normal((4, 80))
    assert p_of(alike, cells(0.)) < 1e-3 and p_of(alike, cells(.1)) > .99
    assert np.mean([p_of(alike, cells(.02)) < .05 for _ in range(200)]) < .1  # at the margin itself


def test_the_first_beginning_counts(tmp_path):
    r = results(tmp_path, {"simclr": 2., "random": .2}, begun=1_000_000.)
    assert made_at(r).timestamp() == 1_000_000
    (tmp_path / "run-x").mkdir()
    (tmp_path / "run-x" / "run.json").write_text('{"budget": {"seconds": 30}}')
    os.utime(tmp_path / "run-x" / "run.json", (1_000_010, 1_000_010))
    r.items[0]["cost"] = {"run": "run-x"}
    assert made_at(r).timestamp() == 999_980
