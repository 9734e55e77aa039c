"""One training in two processes is the training in one: same order, views, losses and weights, but for rounding; faults are told."""
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import two_processes
from small import small_objective

from tasl_lab import training
from tasl_lab.config import PretrainConfig
from tasl_lab.core import InputError, read_json
from tasl_lab.data.phantom import phantom
from tasl_lab.objectives.compose import gradient_agreement
from tasl_lab.training import load_encoder, pretrain

SPECS = {"simclr": "cnn-tiny", "mae": "vit-tiny", "byol": "cnn-tiny", "simclr+0.5*masked": "cnn-tiny"}


@pytest.fixture(scope="module")
def data():
    """Chosen, with the rate below, so that a training does not hang on rounding: one whose first weights are moved by one unit in the last
    place kept its losses within 1e-5, too. On other pictures, or at higher rates, two processes can part by more than that in eight steps:
    AdamW's first steps are whole ones also where a gradient is barely there, and so blow up what rounding leaves."""
    return phantom(48, size=32, seed=4)


def config(spec, **given):
    return PretrainConfig.of(**{"objective": spec, "encoder": SPECS[spec], "steps": 8, "batch": 16, "precision": "fp32", "watch": 4, "lr": 1e-5} | given)


def curve(c, data, out, devices): return list(pretrain(c, data, out, "cpu", devices=devices))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_two_processes_are_one(spec, data, tmp_path):
    given = {"balance": "surgery"} if "+" in spec else {}
    one, two = (curve(config(spec, **given), data, tmp_path / str(n), n) for n in (1, 2))
    assert np.abs(np.subtract([s.loss for s in one], [s.loss for s in two])).max() < 1e-5
    assert [s.pictures for s in one] == [s.pictures for s in two] and [s.encoded for s in one] == [s.encoded for s in two]
    for a, b in zip(one, two):  # gradients, parts and readings of collapse too
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3) and a.parts.keys() == b.parts.keys()
        assert all(v == pytest.approx(b.parts[k], rel=2e-3, abs=1e-4) for k, v in a.parts.items()), (a.parts, b.parts)
    weights = [torch.cat([v.flatten() for v in load_encoder(tmp_path / str(n), "cpu").state_dict().values()]) for n in (1, 2)]
    assert (weights[0] - weights[1]).abs().max() < 1e-3 * weights[0].abs().max()
    records = [read_json(tmp_path / str(n) / "run.json") for n in (1, 2)]
    assert [r["devices"] for r in records] == [1, 2] and records[0]["id"] == records[1]["id"]
    assert not torch.distributed.is_initialized() and "RANK" not in os.environ


def moved(monkeypatch, seed):
    "From now on a run begins with every weight one unit in the last place higher or lower."
    whole, g = training.Run.__init__, torch.Generator().manual_seed(seed)

    def begin(self, *args, **kw):
        whole(self, *args, **kw)
        with torch.no_grad():
            for p in self.objective.parameters(): p.copy_(torch.nextafter(p, p + (torch.rand(p.shape, generator=g) - .5).sign()))
    monkeypatch.setattr(training.Run, "__init__", begin)


AS_ONE, SEEN = 6, 10  # steps of the default schedule: those within 1e-5, and those that are looked at


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["simclr", "mae", "byol"])
def test_at_the_default_rate_they_part_as_rounding_parts_them(spec, monkeypatch):
    """At the rate and schedule that a user gets (150 steps) the losses on these pictures are equal within 1e-5 for the first 6 steps: BYOL held
    for 8 of the 10 that are looked at, SimCLR and MAE for all. On others they may part sooner: BYOL did at the fourth step on seed 3.

    They part because two processes add up in another order than one, and high rates blow up what rounding leaves. One process whose
    first weights are moved by one unit in the last place parts from itself as fast. So the difference may be no larger than that
    of such a move, a few steps later."""
    c, data = config(spec, lr=None, steps=150, watch=0), phantom(48, size=32, seed=1)
    def losses(devices=1): return np.array([s.loss for s in islice(pretrain(c, data, None, "cpu", devices=devices), SEEN)])
    one = losses()
    apart = np.maximum.accumulate(np.abs(losses(2) - one))
    with monkeypatch.context() as m:
        moved(m, 0)
        by_rounding = np.maximum.accumulate(np.abs([losses() - one for _ in range(2)]).max(0))
    assert apart[AS_ONE - 1] < 1e-5 and (apart[:-3] <= 10 * by_rounding[3:] + 1e-6).all()


@pytest.mark.slow
def test_stopped_on_two_goes_on_with_one(data, tmp_path):
    c = config("simclr")
    whole = [s.loss for s in curve(c, data, None, 1)]
    for state in pretrain(c, data, tmp_path, "cpu", every=2, devices=2):
        if state.step == 5: break
    rest = curve(c, data, tmp_path, 1)
    assert rest[0].step == 5 and np.allclose([s.loss for s in rest], whole[4:], atol=2e-5)
    assert pd.read_parquet(tmp_path / "metrics.parquet").step.tolist() == list(range(1, 9))


@pytest.mark.slow
def test_a_lost_process_is_one_clear_error(data, tmp_path, monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(training.subprocess, "Popen", lambda *a, **kw: started.append(start(*a, **kw)) or started[-1])
    with pytest.raises(RuntimeError, match="process 1 of this training ended with -9"):
        for state in pretrain(config("simclr", steps=50), data, tmp_path, "cpu", every=2, devices=2):
            if state.step == 4: started[0].kill()
    assert (tmp_path / "checkpoint.safetensors").is_file() and not torch.distributed.is_initialized()
    assert started[0].poll() == -9


@pytest.mark.slow
def test_helpers_end_with_the_first(data, tmp_path):
    "Also when it is killed: a helper hears that its standard input is closed."
    code = ("import sys\nfrom tasl_lab.config import PretrainConfig\nfrom tasl_lab.data.phantom import phantom\nfrom tasl_lab import training\n"
            "kept, start = [], training.subprocess.Popen\n"
            "training.subprocess.Popen = lambda *a, **kw: kept.append(start(*a, **kw)) or kept[-1]\n"
            "c = PretrainConfig.of(objective='byol', steps=500, batch=8)\n"
            "for s in training.pretrain(c, phantom(16, size=32), device='cpu', devices=2):\n"
            "    if s.step == 2: print(kept[0].pid, flush=True); sys.stdin.read()\n")
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    helper = int(first.stdout.readline())
    first.kill()
    first.wait()
    import time
    for _ in range(300):
        if not alive(helper): return
        time.sleep(.1)
    os.kill(helper, 9)
    raise AssertionError("the helper went on")


def alive(pid):
    "Is it there, and no mere entry of a table?"
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


def agreement(rank, world=2):
    "Gradient agreement of a hybrid on this process's share of eight pictures."
    objective, batch = small_objective("simclr+0.5*masked", "CNN", batch=8 // world, rank=rank, world=world)
    return gradient_agreement(objective(objective.views(batch, 0), .5), objective.encoder)


@pytest.mark.slow
def test_agreement_is_that_of_the_whole_batch(tmp_path):
    first, second = two_processes(agreement, tmp_path)
    alone = agreement(0, 1)
    assert first == second and all(first[k] == pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in alone.items())


@pytest.mark.parametrize("given, devices, says", [({"batch": 9}, 2, "multiple of 2"), ({}, 0, "at least 1")])
def test_what_cannot_be_shared_is_refused(given, devices, says, data, tmp_path):
    with pytest.raises(InputError, match=says): next(pretrain(config("simclr", **given), data, tmp_path / "out", "cpu", devices=devices))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_devices_that_are_not_there_are_refused(data):
    with pytest.raises(InputError, match="cuda"): next(pretrain(config("simclr"), data, device="cuda", devices=2))
