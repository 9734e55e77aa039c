"""Training: the same run twice, in parts or after a kill is the same run; records say what happened; wrong input is one error."""
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch

from tasl_lab.config import PretrainConfig
from tasl_lab.core import InputError, read_json, write_json
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.resources import PHASES, Meter, resource_line, resources
from tasl_lab.training import Diverged, Run, batch_ids, execute, load_checkpoint, load_encoder, load_objective, pretrain, rate_at

SPECS = [("simclr", "cnn-tiny"), ("spark", "cnn-tiny"), ("mae", "vit-tiny"), ("simclr+0.5*masked", "cnn-tiny")]


def pictures(seed=0, n=24, split=None):
    x = np.random.default_rng(seed).integers(0, 255, (n, 1, 4, 4)).astype(np.uint8).repeat(4, 2).repeat(4, 3)
    return ImageSet(x, Info("blocks"), table=pd.DataFrame({"split": split or ["train"] * n}))


def config(spec="spark", encoder="cnn-tiny", **given):
    return PretrainConfig.of(**{"objective": spec, "encoder": encoder, "steps": 6, "batch": 8, "precision": "fp32"} | given)


def losses(states): return [s.loss for s in states]


# ---------- the collapse watch ----------

def test_a_collapsed_run_says_so(tmp_path):
    "SimSiam without what keeps it from collapsing, and as it should be: the note of the last step, its record and its readings."
    data, notes = phantom(64, size=32, seed=3), {}
    for name, options in {"broken": {"stop_gradient": False, "output_norm": False}, "sound": {}}.items():
        c = config("simsiam", steps=40, batch=32, lr=5e-3, options={"simsiam": options}, watch=10)
        states = list(pretrain(c, data, tmp_path / name, "cpu"))
        notes[name] = states[-1].note
        assert read_json(tmp_path / name / "run.json")["note"] == states[-1].note
        assert [s.step - 1 for s in states if "rankme" in s.parts] == [0, 10, 20, 30, 39] and {"spread", "head/spread"} <= set(states[0].parts)
    assert notes["broken"].startswith("Collapsed") and "try" in notes["broken"] and notes["sound"] == ""


# ---------- the optimiser ----------

def test_a_step_is_that_of_adamw_whatever_the_order_in_memory():
    "Positions of a ViT do not lie in the order of their axes, and gradients that are written by hand do: the fused step knows neither."
    run = Run(config("simclr+0.5*masked", "vit-tiny", balance="surgery"), phantom(16, size=32), "cpu")
    twins = {p: p.detach().clone(memory_format=torch.contiguous_format) for group in run.optimizer.param_groups for p in group["params"]}
    plain = torch.optim.AdamW([group | {"params": [twins[p] for p in group["params"]], "fused": False} for group in run.optimizer.param_groups])
    assert any(not p.is_contiguous() for p in twins)
    for step in range(2):
        state = run.step(step)
        for group in plain.param_groups: group["lr"] = state.rate
        for p, q in twins.items(): q.grad = None if p.grad is None else p.grad.contiguous()
        plain.step()
        for p, q in twins.items(): torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-5)


# ---------- resume ----------

@pytest.mark.parametrize("spec, encoder", SPECS)
@pytest.mark.parametrize("kill", [1, 3, 5])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, spec, encoder, kill):
    whole = losses(pretrain(config(spec, encoder), pictures(), device="cpu"))
    first = []
    for state in pretrain(config(spec, encoder), pictures(), tmp_path, "cpu", every=2):
        first.append(state.loss)
        if state.step == kill: break  # killed: the generator is dropped
    second = list(pretrain(config(spec, encoder), pictures(), tmp_path, "cpu", every=2))
    assert first == whole[:kill] and second[0].step == kill // 2 * 2 + 1 and losses(second) == whole[second[0].step - 1:]
    rows = pd.read_parquet(tmp_path / "metrics.parquet")
    assert rows.step.tolist() == [1, 2, 3, 4, 5, 6] and rows.loss.tolist() == whole and not (tmp_path / "checkpoint.safetensors").exists()


def test_interrupted_run_keeps_equal_weights(tmp_path):
    for _ in pretrain(config(), pictures(), tmp_path / "a", "cpu"): pass
    for state in pretrain(config(), pictures(), tmp_path / "b", "cpu", every=1):
        if state.step == 4: break
    for _ in pretrain(config(), pictures(), tmp_path / "b", "cpu"): pass
    a, b = (load_encoder(tmp_path / k, "cpu").state_dict() for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    one, two = (read_json(tmp_path / k / "run.json") for k in "ab")
    assert one["id"] == two["id"] and one["budget"]["pictures"] == two["budget"]["pictures"] == 48 and one["budget"]["encoded"] == two["budget"]["encoded"]


def stopped(folder, data=None, **given):
    "A run that was killed after two steps."
    for state in pretrain(config(**given), data or pictures(), folder, "cpu", every=1):
        if state.step == 2: return folder


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match="another configuration"): next(pretrain(config(seed=1), pictures(), stopped(tmp_path), "cpu"))


def test_checkpoint_of_other_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="checkpoint"): next(pretrain(config(), pictures(seed=1), stopped(tmp_path), "cpu"))


@pytest.mark.parametrize("harm", ["cut", "empty", "rows"])
def test_harmed_checkpoint_is_one_error(tmp_path, harm):
    file = stopped(tmp_path) / ("metrics.parquet" if harm == "rows" else "checkpoint.safetensors")
    if harm == "rows": file.unlink()
    else: file.write_bytes(file.read_bytes()[:1000] if harm == "cut" else b"")
    with pytest.raises(InputError, match=file.name): next(pretrain(config(), pictures(), tmp_path, "cpu"))


def test_checkpoint_restores_the_optimiser(tmp_path):
    stopped(tmp_path)
    run = Run(config(), pictures(), "cpu")
    assert load_checkpoint(run, tmp_path / "checkpoint.safetensors")[0] == 2
    states = run.optimizer.state_dict()["state"]
    assert states and all(s["step"] == 2 for s in states.values()) and sum(s["exp_avg_sq"].sum() for s in states.values()) > 0


# ---------- what a run costs ----------

def test_phases_add_up_to_the_time_of_the_steps():
    "Against a clock of the test's own; pauses between steps are not counted."
    wall, last = 0., None
    run = Run(config("simclr", steps=8, watch=2), pictures(), "cpu")
    for step in range(8):
        time.sleep(.02)
        start = time.perf_counter()
        last = run.step(step)
        wall += time.perf_counter() - start
    assert last.seconds == sum(last.phases.values()) and .7 * wall < last.seconds <= wall
    assert list(last.phases) == list(PHASES) and all(v > 0 for v in last.phases.values())


def slowed(work):
    def slow(*args, **kw):
        time.sleep(.3)
        return work(*args, **kw)
    return slow


def test_phases_hold_what_they_name(monkeypatch):
    "A part that is made slow shows in its own phase."
    parts = {"data": "batch", "views": "objective.views", "forward": "objective.forward", "watch": "look", "backward": "objective.backward",
             "optimiser": "optimizer.step"}
    for phase, part in parts.items():
        run = Run(config(steps=3, watch=1), pictures(), "cpu")
        run.step(0)
        before = run.step(1).phases
        *owner, name = part.split(".")
        owner = getattr(run, owner[0]) if owner else run
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
        after = run.step(2).phases
        assert max(after, key=lambda k: after[k] - before[k]) == phase and after[phase] - before[phase] >= .3


def test_resumed_run_carries_on_its_account(tmp_path):
    for state in pretrain(config(watch=1), pictures(), tmp_path, "cpu", every=2):
        if state.step == 4: break
    rows = pd.read_parquet(tmp_path / "metrics.parquet")
    rows.assign(peak_mb=rows.peak_mb + 9000).to_parquet(tmp_path / "metrics.parquet")
    for _ in pretrain(config(watch=1), pictures(), tmp_path, "cpu"): pass
    rows, budget = pd.read_parquet(tmp_path / "metrics.parquet"), read_json(tmp_path / "run.json")["budget"]
    spent = rows.filter(like="seconds:")
    assert (spent.diff().iloc[1:] > 0).all(axis=None) and list(spent) == [f"seconds:{p}" for p in PHASES] and rows.peak_mb.is_monotonic_increasing
    assert np.allclose(spent.sum(axis=1), rows.seconds) and budget["seconds"] == rows.seconds.iloc[-1]
    used = budget["resources"]
    assert used["pictures_per_second"] == pytest.approx(48 / budget["seconds"], abs=.1) and sum(used["share"].values()) == pytest.approx(1, abs=1e-3)
    assert used["peak_memory_mb"] == round(rows.peak_mb.iloc[-1]) >= 9000


def test_a_run_stopped_by_an_earlier_version_is_resumed(tmp_path):
    "Its rows have seconds, but no phases."
    stopped(tmp_path)
    rows = pd.read_parquet(tmp_path / "metrics.parquet")
    assert {"seconds:views", "peak_mb"} <= set(rows)
    rows[[c for c in rows if not c.startswith("seconds:") and c != "peak_mb"]].to_parquet(tmp_path / "metrics.parquet")
    for _ in pretrain(config(), pictures(), tmp_path, "cpu"): pass
    budget = read_json(tmp_path / "run.json")["budget"]
    assert budget["seconds"] > rows.seconds.iloc[-1] and "earlier" in resource_line(budget["resources"])
    assert budget["resources"]["share"]["earlier"] == pytest.approx(rows.seconds.iloc[-1] / budget["seconds"], abs=1e-3)


def test_the_line_keeps_the_order_of_a_step():
    used = json.loads(json.dumps(resources(100, {"views": 1., "data": .001, "forward": 2., "backward": 1.}, 63.6), sort_keys=True))
    assert resource_line(used) == "25 pictures/s; views 25 %, forward 50 %, backward 25 %; peak 64 MB"


class Queue:
    "A stand-in for a GPU's clock: an event gets its time when the device reaches it, which here is when the test says so."
    def __init__(self): self.events, self.waits = [], 0

    def reach(self, *times):
        for event, at in zip([e for e in self.events if e.at is None], times): event.at = at

    def event(queue, enable_timing):
        class Event:
            at = None
            def record(self, stream): queue.events.append(self)
            def query(self): return self.at is not None
            def elapsed_time(self, end): return end.at - self.at
            def synchronize(self):
                queue.waits += 1
                queue.reach(*range(1000, 1000 + len(queue.events)))
        assert enable_timing
        return Event()


def test_a_gpu_is_timed_by_its_own_clock_and_not_waited_for(monkeypatch):
    queue = Queue()
    for name, stand_in in {"Event": queue.event, "current_stream": lambda device: device, "reset_peak_memory_stats": lambda device: None,
                           "max_memory_allocated": lambda device: 5 * 2 ** 20}.items(): monkeypatch.setattr(torch.cuda, name, stand_in)
    meter = Meter(torch.device("cuda"))
    for phase in ("views", "forward", None, "views"): meter(phase)
    assert not any(meter.read().values()), "nothing has run yet"
    queue.reach(100, 300)
    assert meter.read()["views"] == .2 and meter.read()["forward"] == 0
    queue.reach(900, 990)
    assert meter.read()["forward"] == .6 and meter.read()["views"] == .2 and queue.waits == 0
    meter.stop()
    assert meter.read(wait=True)["views"] == pytest.approx(.2 + .010) and queue.waits == 1 and meter.peak_mb == 5


# ---------- the order of pictures, the rate ----------

@pytest.mark.parametrize("n, batch", [(10, 3), (8, 8), (7, 1)])
def test_every_epoch_is_a_permutation(n, batch):
    pool, per = np.arange(100, 100 + n), n // batch
    for epoch in range(3):
        seen = np.concatenate([batch_ids(pool, batch, 0, epoch * per + k) for k in range(per)])
        assert len(set(seen)) == per * batch and set(seen) <= set(pool)
    assert [batch_ids(pool, batch, 0, s).tolist() for s in range(9)] != [batch_ids(pool, batch, 1, s).tolist() for s in range(9)]


@pytest.mark.parametrize("warmup, steps", [(w, s) for w in (0., .05, .1, .3, 1.) for s in (1, 2, 15, 25, 70, 100, 150)])
def test_rate_rises_to_its_peak_and_falls(steps, warmup):
    rates = [rate_at(s, steps, 2., warmup) for s in range(steps)]
    top = int(np.argmax(rates))
    assert max(rates) <= 2 + 1e-9 and min(rates) > 0 and (np.diff(rates[:top + 1]) >= -1e-9).all() and (np.diff(rates[top:]) <= 1e-9).all()
    assert max(rates) > (1.9 if steps > 10 else .5) and (warmup == 1 or steps < 70 or rates[-1] < .01)


def test_only_the_train_split_is_seen():
    data = pictures(split=["train", "val", "test"] * 8)
    run = Run(config(batch=4), data, "cpu")
    assert set(run.pool) == set(data.ids("train")) and all(set(batch_ids(run.pool, 4, 0, s)) <= set(run.pool) for s in range(6))


# ---------- records ----------

@pytest.mark.parametrize("spec, encoder", SPECS)
def test_finished_run_is_read_back(tmp_path, spec, encoder):
    data = pictures()
    states = list(pretrain(config(spec, encoder, steps=2), data, tmp_path, "cpu"))
    record, x = read_json(tmp_path / "run.json"), torch.randn(2, 1, 16, 16)
    assert record["budget"]["steps"] == 2 and record["budget"]["pictures"] == 16 == states[-1].pictures and record["data"]["sha256"] == data.sha256
    assert record["budget"]["encoded"] == sum(s.encoded for s in states)
    objective, alone = load_objective(tmp_path, data, "cpu"), load_encoder(tmp_path, "cpu")
    with torch.no_grad(): assert torch.equal(objective.encoder(x).pooled, alone(x).pooled) and not alone.training
    with pytest.raises(InputError, match="another set"): load_objective(tmp_path, pictures(seed=1), "cpu")


def test_rounding_makes_no_other_set_but_another_seed_does(tmp_path):
    "Computed pictures may differ by a grey level on another processor: a finished run is known again, a stopped one goes on with its very bits."
    data, near, other = phantom(40, size=32, seed=3), phantom(40, size=32, seed=3), phantom(40, size=32, seed=4)
    near.images += (near.images < 255).astype(np.uint8)
    list(pretrain(config(steps=2), data, tmp_path / "run", "cpu"))
    with torch.no_grad(): load_objective(tmp_path / "run", near, "cpu")
    for wrong in (other, phantom(39, size=32, seed=3), phantom(40, size=32, seed=3, preset="ct"), phantom(40, size=48, seed=3)):
        with pytest.raises(InputError, match="another set"): load_objective(tmp_path / "run", wrong, "cpu")
    record = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", record | {"data": {k: record["data"][k] for k in ("name", "sha256")}})  # as earlier versions wrote it
    load_objective(tmp_path / "run", data, "cpu")
    with pytest.raises(InputError, match="another set"): load_objective(tmp_path / "run", near, "cpu")
    next(pretrain(config(steps=2), data, tmp_path / "cut", "cpu", every=1))
    with pytest.raises(InputError, match="another set"): next(pretrain(config(steps=2), near, tmp_path / "cut", "cpu"))


def test_identity_names_what_changes_results():
    base = config("simclr+0.5*masked").identity("data")
    assert config("0.5*spark+simclr").identity("data") == base == config("simclr+0.50*masked").identity("data")
    assert len({base, config("simclr+0.4*masked").identity("data"), config("simclr+0.5*masked", seed=1).identity("data"),
                config("simclr+0.5*masked", batch=4).identity("data"), config("simclr+0.5*masked").identity("other")}) == 5
    assert config("masked").identity("d") == config("spark").identity("d") != config("masked", "vit-tiny").identity("d")


def test_diverging_run_stops_before_the_weights_are_harmed():
    run = Run(config(), pictures(), "cpu")
    before = {k: v.clone() for k, v in run.encoder.state_dict().items()}
    with torch.no_grad(): run.objective.decoder.pixels.bias.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 0"): run.step(0)
    assert all(torch.equal(v, before[k]) for k, v in run.encoder.state_dict().items())


def test_finished_work_is_not_done_again(tmp_path):
    done = []

    def work(item, folder):
        if item < 0: raise RuntimeError("fault")
        done.append(item)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    with pytest.raises(RuntimeError): execute({"a": 1, "b": -1, "c": 3}, tmp_path, work)
    folders = execute({"a": 1, "b": 2, "c": 3}, tmp_path, work)
    assert done == [1, 2, 3] and [f.name for f in folders.values()] == ["a", "b", "c"]
    with pytest.raises(InputError, match="run.json"): execute({"d": 4}, tmp_path, lambda item, folder: None)


# ---------- what cannot work is refused ----------

@pytest.mark.parametrize("given, words", [
    (dict(spec="nonesuch"), "'nonesuch'"), (dict(steps=0), "steps = 0"), (dict(batch="many"), "batch = 'many'"), (dict(lr=-1.), "lr = -1"),
    (dict(epochs=3), "'epochs'"),
    (dict(warmup=2.), "warmup = 2"), (dict(seed=-1), "seed = -1"), (dict(lr=float("nan")), "lr"), (dict(weight_decay=-.1), "weight_decay = -0.1"),
])
def test_wrong_configuration(given, words):
    with pytest.raises(InputError, match=words): config(**given)


@pytest.mark.parametrize("given, data, words", [
    (dict(encoder="resnet"), pictures(), "'resnet'"), (dict(batch=25), pictures(), "batch of 25"), (dict(spec="simclr", batch=1), pictures(), "batch of 1"),
    (dict(), pictures(split=["test"] * 24), "'train'"), (dict(precision="fp8"), pictures(), "fp8"), (dict(spec="mae"), pictures(), "spark on a CNN"),
    (dict(spec="mae", encoder="vit-base"), pictures(), "cells of 16"), (dict(), ImageSet(np.zeros((9, 1, 20, 20), np.uint8), Info("odd")), r"\(20, 20\)"),
    (dict(), ImageSet([np.zeros((1, 16, 16), np.uint8), np.zeros((1, 16, 32), np.uint8)], Info("ragged")), "different sizes"),
])
def test_impossible_run(given, data, words):
    with pytest.raises(InputError, match=words): next(pretrain(config(**given), data, device="cpu"))


@pytest.mark.parametrize("missing", ["encoder.safetensors", "run.json"])
def test_unfinished_folder_is_named(tmp_path, missing):
    with pytest.raises(InputError, match=missing): (load_encoder if missing.startswith("encoder") else lambda f: load_objective(f, pictures()))(tmp_path)
