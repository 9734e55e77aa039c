"""A pre-training that is killed at an arbitrary step and resumed gives, to the last bit, what it gives uninterrupted."""
import multiprocessing
import os
import random
import signal
import time

import pandas as pd
import pytest

pytestmark = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
STEPS, EVERY = 24, 4


def train(config: dict, out: str, steps_done=None):
    "One pre-training on a small phantom, in a process of its own. Given a queue it reports each step, and waits before the last to be killed."
    import torch

    from tasl_lab.config import PretrainConfig
    from tasl_lab.data.sources import load
    from tasl_lab.training import pretrain
    torch.set_num_threads(1)
    for state in pretrain(PretrainConfig.of(**config), load("phantom", 32, n=80), out, "cpu", EVERY):
        if steps_done is None: continue
        steps_done.put(state.step)
        if state.step == STEPS - 1: time.sleep(600)


@pytest.fixture(scope="module")
def processes():
    "Processes that start with the libraries loaded."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasl_lab.training", "tasl_lab.data.sources", "monai.networks.nets.segresnet_ds", "monai.networks.blocks.transformerblock"])
    return context


def finish(process):
    process.start()
    process.join()
    assert process.exitcode == 0


def kill_after(context, config, out, step: int, delay: float):
    "Start; kill -9 `delay` seconds after `step` is reported, wherever the process then is."
    done = context.SimpleQueue()
    process = context.Process(target=train, args=(config, out, done))
    process.start()
    while done.get() < step: pass
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("objective, encoder", [("simclr", "cnn-tiny"), ("masked", "vit-tiny"), ("simclr+0.5*masked", "vit-tiny")])
def test_kill_and_resume_is_exact(processes, tmp_path, objective, encoder):
    config = {"objective": objective, "encoder": encoder, "steps": STEPS, "batch": 8, "watch": 3}
    seed = int(os.environ.get("TASL_KILL_SEED", 0)) or random.SystemRandom().randrange(1, 10**6)
    draw, delay = random.Random(seed).randrange(1, STEPS), random.Random(seed).uniform(0, .05)
    print(f"killed {1000 * delay:.0f} ms after step {draw} of {STEPS}; TASL_KILL_SEED={seed} draws the same")
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    finish(processes.Process(target=train, args=(config, whole)))
    kill_after(processes, config, cut, draw, delay)
    assert not (tmp_path / "cut" / "run.json").exists() and not (tmp_path / "cut" / "encoder.safetensors").exists()
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists() or draw < EVERY
    finish(processes.Process(target=train, args=(config, cut)))
    a, b = (pd.read_parquet(f"{f}/metrics.parquet").drop(columns="peak_mb").filter(regex="^(?!seconds)") for f in (whole, cut))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert a.step.tolist() == list(range(1, STEPS + 1))
    assert (tmp_path / "whole" / "encoder.safetensors").read_bytes() == (tmp_path / "cut" / "encoder.safetensors").read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
