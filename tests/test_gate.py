"""The gate: it rejects what it should, keeps what it should, loses nothing to a kill, and tells when it was wrong."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tasl_lab.alignment import gate
from tasl_lab.alignment.gate import (
    Gate,
    GateConfig,
    GateItem,
    choose_checkpoint,
    cost_of_rules,
    decide,
    false_rejections,
    foretold,
    outcomes,
    run_gate,
    savings,
)
from tasl_lab.core import InputError, read_json, rng, write_json
from tasl_lab.data.phantom import phantom
from tasl_lab.training import Diverged, load_encoder, pretrain

LEVELS = {None: (.60, .70), "simclr": (.80, .90), "masked": (.58, .85), "byol": (.80, .60), "vicreg": (.55, .60)}  # proxy, and metric once tuned
COLLAPSED = "Collapsed: in the features all pictures look alike."


@pytest.fixture(scope="module")
def data(): return phantom(120, size=32, seed=5)


def record(stage, objective, seed, level, note="", finite=True, patients=20):
    cells = level + rng("fake", stage, objective, seed).normal(0, .01, patients)
    cost = dict(pictures=100, seconds=1.) if stage == 1 else dict(pictures=1000, seconds=10.)
    return dict(stage=stage, objective=objective, seed=seed, note=note, finite=finite, metric="auroc", value=float(cells.mean()), cells=cells.tolist(),
                encoded=0, proxy_seconds=.5, tuning_seconds=2.) | cost


def records(stage, notes=None, finite=(), levels=LEVELS):
    return [record(stage, o, s, levels[o][stage - 1], (notes or {}).get(o, ""), o not in finite) for o in levels for s in range(3)]


@pytest.fixture
def fake(monkeypatch):
    "Cheap stages that write known records, and a list of the items that were done."
    done = []

    def stage(number):
        def work(data, config, item, out):
            done.append((number, item.objective, item.seed))
            note = COLLAPSED if (item.objective, item.seed, number) == ("byol", 1, 1) else ""
            write_json(out / "gate.json", record(number, item.objective, item.seed, LEVELS[item.objective][number - 1], note))
        return work

    monkeypatch.setattr(gate, "first_stage", stage(1))
    monkeypatch.setattr(gate, "second_stage", stage(2))
    return done


OBJECTIVES = ["simclr", "masked", "byol", "vicreg"]


def test_only_survivors_are_finished(fake, data, tmp_path):
    "A good objective passes; one below the random encoder, and one that collapsed in a single seed, do not."
    found = run_gate(GateConfig.of(objectives=OBJECTIVES, labels=40), data, tmp_path)
    assert dict(zip(found.decisions.objective, found.decisions.passed)) == {"simclr": True, "masked": False, "byol": False, "vicreg": False}
    assert {o for stage, o, _ in fake if stage == 2} == {None, "simclr"} and len(fake) == 5 * 3 + 2 * 3
    reasons = found.decisions.set_index("objective").reason
    assert "seed 1: Collapsed" in reasons["byol"] and "not above the random encoder's" in reasons["masked"] and reasons["simclr"] == ""


def test_validation_finishes_all_and_reuses_what_was_done(fake, data, tmp_path):
    config = GateConfig.of(objectives=OBJECTIVES, labels=40)
    run_gate(config, data, tmp_path)
    before = len(fake)
    found = run_gate(config.model_copy(update={"validation": True}), data, tmp_path)
    assert {(stage, o) for stage, o, _ in fake[before:]} == {(2, o) for o in ("masked", "byol", "vicreg")} and len(fake) == before + 9
    assert len(outcomes(found)) == 4 and outcomes(found).worth.tolist() == [True, True, False, False]
    run_gate(config.model_copy(update={"objectives": ["vicreg", "simclr"]}), data, tmp_path)
    assert len(fake) == before + 9  # nothing twice


def test_a_kill_loses_no_finished_item(fake, data, tmp_path, monkeypatch):
    stage, config = gate.first_stage, GateConfig.of(objectives=OBJECTIVES, labels=40)

    def killed(data, config, item, out):
        if len(fake) == 7: raise KeyboardInterrupt
        stage(data, config, item, out)

    monkeypatch.setattr(gate, "first_stage", killed)
    with pytest.raises(KeyboardInterrupt): run_gate(config, data, tmp_path)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("gate.json")}
    assert len(finished) == 7
    monkeypatch.setattr(gate, "first_stage", stage)
    run_gate(config, data, tmp_path)
    assert finished == {p: p.stat().st_mtime_ns for p in finished} and len(fake) == len(set(fake)) == 5 * 3 + 2 * 3


def test_an_injected_executor_gets_the_work(fake, data, tmp_path):
    calls = []

    def mine(items, out, work, done, progress, workers):
        calls.append((len(items), done, workers))
        for name, item in items.items(): work(item, out / name)

    run_gate(GateConfig.of(objectives=["simclr"], labels=40), data, tmp_path, execute=mine, workers=3)
    assert calls == [(6, "gate.json", 3), (6, "gate.json", 3)]


def test_the_three_rules_from_strict_to_lenient():
    "A proxy a little above: its mean is, its interval is not."
    levels = {None: (.600, 0), "simclr": (.606, 0), "masked": (.9, 0)}
    found = decide(GateConfig.of(objectives=["simclr", "masked"]), records(1, levels=levels))
    assert found.loc[1, ["separate", "above", "paired"]].all() and not found.separate[0]
    assert (found.separate <= found.above).all()
    for rule in ("separate", "above", "paired"):
        chosen = decide(GateConfig.of(objectives=["simclr", "masked"], rule=rule), records(1, levels=levels))
        assert chosen.passed.tolist() == found[rule].tolist()


def test_a_diverged_objective_is_rejected_with_its_words():
    levels = {k: LEVELS[k] for k in (None, "simclr")}
    bad = records(1, {"simclr": "loss nan"}, ("simclr",), levels)
    found = decide(GateConfig.of(objectives=["simclr"]), bad)
    assert not found.passed[0] and "diverged with seed 0: loss nan" in found.reason[0]


def test_what_validation_reports():
    "masked is worth finishing and was rejected; byol passed the proxy but collapsed, and is not worth it."
    found = Gate(GateConfig.of(objectives=OBJECTIVES, validation=True, steps=100), "fake", records(1, {"byol": COLLAPSED}), records(2))
    rates = false_rejections(found).set_index(["rule", "paradigm"])
    assert rates.loc[("separate", "contrastive"), ["worth", "rejected"]].tolist() == [1, 0]
    assert rates.loc[("separate", "generative and reconstruction"), ["worth", "rejected"]].tolist() == [1, 1]
    assert rates.loc[("separate", "all")].rate == .5 and rates.loc[("separate", "all")].low < .02 < .98 < rates.loc[("separate", "all")].high
    cost = savings(found).set_index("cost")
    assert cost.pictures.tolist()[:2] == [12 * 1000, 3 * 1000 + 9 * 100]
    assert cost.seconds.tolist()[:2] == [12 * 12, 3 * 12 + 9 * 1 + 15 * .5] and cost.measured.all()


def test_savings_without_validation_are_said_to_be_guessed():
    second = [r for r in records(2) if r["objective"] in (None, "simclr")]
    found = Gate(GateConfig.of(objectives=OBJECTIVES, steps=10, batch=100), "fake", records(1, {"byol": COLLAPSED}), second)
    assert not savings(found).measured.any() and savings(found).pictures[0] == 12 * 1000 and savings(found).seconds[0] == 12 * 12
    for report in (foretold, false_rejections):
        with pytest.raises(InputError, match="validation=True"): report(found)


def runs(x, y, spread=.02, noise=.001):
    "Gates of objectives whose runs are alike: `x` and `y` are their true levels."
    names = [None, "simclr", "masked", "byol", "vicreg", "barlow", "mocov3", "simsiam"][:len(x) + 1]
    def of(levels):
        value = lambda o, s, level: {"value": level + float(rng("runs", o, s, level).normal(0, noise))}
        return [record(1, o, s, level, patients=1) | value(o, s, level) for o, level in zip(names, levels) for s in range(5)]
    return Gate(SimpleNamespace(objectives=names[1:]), "fake", of([0, *x]), of([0, *y]))


def test_the_rank_correlation_is_clustered():
    "Five runs of an objective are no five witnesses: with unrelated levels the interval holds zero, although runs alone would exclude it."
    x, y = [.1, .2, .3, .4, .5, .6, .7], [.4, .1, .6, .2, .7, .3, .5]
    found, same = foretold(runs(x, y)), foretold(runs(x, x))
    assert found["runs"] == 35 and found["low"] < 0 < found["rho"] < found["high"]
    from scipy import stats
    assert stats.spearmanr(np.repeat(x, 5), np.repeat(y, 5)).pvalue < .2 < abs(found["high"] - found["low"])
    assert same["rho"] > .95 and same["low"] > .8
    with pytest.raises(InputError, match="three or more"): foretold(runs(x[:2], y[:2]))


def test_what_seeds_share_is_no_foresight():
    "Nothing but noise between objectives, while whole seeds, the untrained encoder's too, go up in one stage and down in the other."
    g, names, held = rng("shared"), [None, *"abcdef"], []
    for _ in range(60):
        value = lambda o, shared: {"value": shared + float(g.normal()) * (1. if o is None else .1)}
        stages = [[record(k, o, s, 0., patients=1) | value(o, sign * s) for o in names for s in range(3)] for k, sign in ((1, 1), (2, -1))]
        found = foretold(Gate(SimpleNamespace(objectives=names[1:]), "fake", *stages), draws=300)
        held.append(found["low"] <= 0 <= found["high"])
    assert np.mean(held) > .8, np.mean(held)


def test_a_diverged_run_ranks_last():
    levels = {k: LEVELS[k] for k in (None, "simclr", "masked")}
    second = records(2, finite=("masked",), levels=levels)
    gained = gate.gains(second, ["simclr", "masked"])
    assert np.isinf(gained[1]).all() and (gained[1] < 0).all() and np.isfinite(gained[0]).all()


# ---------- the real stages ----------

def small(**given):
    own = {"steps": 6, "share": .34, "seeds": 2, "batch": 16, "labels": 40, "finetune_steps": 2, "precision": "fp32", "proxy": "probe"}
    return GateConfig.of(**{"objectives": ["simclr"]} | own | given)


def test_stage_one_is_the_beginning_of_the_run_and_a_kill_costs_nothing(data, tmp_path, monkeypatch):
    "Killed in the middle of stage 2, the run goes on, and ends as one that was never stopped."
    config, item = small(), GateItem(2, 0, "simclr")
    wanted = config.pretraining("simclr", 0)
    for _ in pretrain(wanted, data, tmp_path / "whole"): pass
    gate.first_stage(data, config, GateItem(1, 0, "simclr"), tmp_path / "one")
    first = read_json(tmp_path / "one" / "gate.json")
    assert config.stop == 2 and first["pictures"] == 32 and first["finite"] and first["note"] == "" and first["metric"] == "auroc"
    steps, real = [], gate.pretrain

    def cut(config, data, out, **options):
        for state in real(config, data, out, **options | {"every": 1}):
            steps.append(state.step)
            if steps == [3, 4]: raise KeyboardInterrupt
            yield state

    monkeypatch.setattr(gate, "pretrain", cut)
    with pytest.raises(KeyboardInterrupt): gate.second_stage(data, config, item, tmp_path / "two")
    gate.second_stage(data, config, item, tmp_path / "two")
    assert steps == [3, 4, 5, 6]
    run = next(tmp_path.glob("run-*"))
    assert (run / "encoder.safetensors").read_bytes() == (tmp_path / "whole" / "encoder.safetensors").read_bytes()
    second = read_json(tmp_path / "two" / "gate.json")
    assert second["pictures"] == 96 and 0 <= second["value"] <= 1 and len(second["cells"]) == data.table.patient[data.ids("test")].nunique()


def test_a_finished_run_of_a_matrix_is_not_trained_again(data, tmp_path, monkeypatch):
    config = small()
    wanted = config.pretraining("simclr", 0)
    for _ in pretrain(wanted, data, tmp_path / f"run-{wanted.identity(data.sha256)}"): pass
    monkeypatch.setattr(gate, "pretrain", lambda *a, **k: pytest.fail("trained again"))
    gate.second_stage(data, config, GateItem(2, 0, "simclr"), tmp_path / "two")
    assert read_json(tmp_path / "two" / "gate.json")["pictures"] == 96


def test_divergence_is_an_answer_not_an_error(data, tmp_path, monkeypatch):
    def diverges(*args, **options):
        raise Diverged("simclr: loss nan at step 1")
        yield
    monkeypatch.setattr(gate, "pretrain", diverges)
    for stage, work in ((1, gate.first_stage), (2, gate.second_stage)):
        work(data, small(), GateItem(stage, 0, "simclr"), tmp_path / str(stage))
        found = read_json(tmp_path / str(stage) / "gate.json")
        assert not found["finite"] and "loss nan" in found["note"] and found["value"] is None


def test_a_collapsed_beginning_is_seen(data, tmp_path):
    "An encoder whose weights are emptied at the stop gives the same features for every picture."
    import torch
    config = small()
    wanted = config.pretraining("simclr", 0)
    gate.begin(wanted, data, config.stop, tmp_path / "start")
    run, rows = gate.stopped(wanted, data, tmp_path / "start"), pd.read_parquet(tmp_path / "start" / "metrics.parquet")
    first = gate._first_readings(rows)
    assert first and gate.collapse_at(run, first, config.stop) == ""
    with torch.no_grad():
        for name, p in run.encoder.named_parameters(): p.mul_(0 if name.endswith("weight") else 1)
    assert gate.collapse_at(run, first, config.stop).startswith("Collapsed")


@pytest.mark.parametrize("proxy", ["matched", "probe"])
@pytest.mark.parametrize("task", ["classification:class", "segmentation:tissue", "detection:boxes"])
def test_stage_one_never_reads_a_test_picture(data, monkeypatch, proxy, task):
    "Neither pictures nor truth: without those of the test split the reading is the same."
    from tasl_lab.alignment import proxies
    seen, real = [], gate.extract

    def watched(encoder, set, ids=None, **options):
        seen.append(np.asarray(ids))
        return real(encoder, set, ids, **options)

    for module in (gate, proxies): monkeypatch.setattr(module, "extract", watched)
    config = small(proxy=proxy, task=task)
    encoder = gate.fresh(config, data, 0)
    read = gate.proxy_of(encoder, data, config, 0)
    assert len(seen) == 1 and not set(seen[0]) & set(data.ids("test")) and set(data.ids("val")) <= set(seen[0])
    assert np.isfinite(read["value"]) and len(read["cells"]) == len(read["groups"]) == data.table.patient[data.ids("val")].nunique()
    assert gate.proxy_of(encoder, data.subset(np.flatnonzero(data.table.split != "test")), config, 0)["value"] == read["value"]


def test_items_are_named_after_what_they_depend_on(data):
    one, name = small(), lambda c, stage=1, o="simclr": GateItem(stage, 0, o).name(c, data)
    for change in ({"labels": 30}, {"task": "segmentation:tissue"}, {"steps": 12}, {"share": .5}, {"precision": "bf16"}, {"proxy": "matched"}):
        assert name(small(**change)) != name(one)
    for change in ({"rule": "above"}, {"validation": True}, {"objectives": ["simclr", "masked"]}, {"seeds": 3}, {"finetune_steps": 9}):
        assert name(small(**change)) == name(one)
    assert name(small(finetune_steps=9), 2) != name(one, 2) and name(small(share=.5), 2) == name(one, 2) and name(one, 1, None).startswith("gate1-random")


@pytest.mark.parametrize("given, said", [
    ({"seeds": 1}, "seeds"), ({"share": .6}, "share"), ({"objectives": ["nothing"]}, "nothing"), ({"rule": "best"}, "rule")])
def test_what_a_gate_refuses(given, said):
    with pytest.raises(InputError, match=said): GateConfig.of(**given)


def test_a_task_that_the_set_lacks_is_refused_before_any_work(fake, data, tmp_path):
    with pytest.raises(InputError, match="nothing"): run_gate(small(task="classification:nothing"), data, tmp_path)
    with pytest.raises(InputError, match="no proxy matches"): run_gate(small(task="reconstruction:denoise", proxy="matched"), data, tmp_path)
    assert not fake


# ---------- checkpoints ----------

def checkpoints(seed, peak):
    below = lambda step: ((step - peak) / 100) ** 2
    return [{"arm": "a", "seed": seed, "step": s, "loss": 5 - s / 50, "proxy": -below(s), "metric": .8 - below(s)} for s in range(20, 101, 20)]


def test_the_proxy_chooses_and_other_rules_pay():
    chosen = choose_checkpoint(pd.DataFrame([r for s in range(4) for r in checkpoints(s, 60)]))
    assert chosen[chosen.rule == "proxy"].step.eq(60).all() and (chosen[chosen.rule == "proxy"].below_best == 0).all()
    assert np.allclose(chosen[chosen.rule != "proxy"].cost, .16)
    cost = cost_of_rules(chosen)
    assert cost.cost.round(9).eq(.16).all() and set(cost.arm) == {"a", "all"}


def test_a_rule_that_is_right_costs_nothing_and_a_misleading_proxy_shows():
    table = pd.DataFrame([r for s in range(4) for r in checkpoints(s, 100)])
    assert choose_checkpoint(table).cost.eq(0).all()
    wrong = choose_checkpoint(table.assign(proxy=-table.proxy))
    assert (wrong[wrong.rule == "last"].cost < 0).all() and (wrong[wrong.rule == "proxy"].below_best > 0).all()


def test_ties_go_to_the_earlier_checkpoint_and_gaps_are_refused():
    table = pd.DataFrame(checkpoints(0, 60))
    assert choose_checkpoint(table.assign(proxy=1.)).step[0] == 20
    with pytest.raises(InputError, match="no loss, proxy or metric"): choose_checkpoint(table.assign(proxy=np.nan))
    with pytest.raises(InputError, match="proxy"): choose_checkpoint(table.drop(columns="proxy"))


def test_points_survive_a_kill(data, tmp_path, monkeypatch):
    "Cut off between a checkpoint and its point, the run takes that point first and goes on; no point is lost or taken twice."
    config, real, taken = small(steps=4, share=.5), gate._tuned, []

    def tuned(*args):
        taken.append(1)
        if len(taken) == 1: raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gate, "_tuned", tuned)
    item, out = GateItem(2, 0, "simclr"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt): gate.follow(data, config, 2, item, out)
    gate.follow(data, config, 2, item, out)
    points = pd.DataFrame(read_json(out / "points.json"))
    assert points.step.tolist() == [2, 4] and len(taken) == 3 and points.notna().all(axis=None)
    rows = pd.read_parquet(out / "metrics.parquet")
    assert np.allclose(points.loss, [rows.loss[:2].mean(), rows.loss[2:].mean()])
    assert load_encoder(out).name == "cnn-tiny"
