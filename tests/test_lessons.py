"""Lessons on other machines: recorded runs know their pictures again although those are rounded otherwise, and no lesson leans on AMX or bf16."""
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasl_lab.config import PretrainConfig
from tasl_lab.core import read_json
from tasl_lab.data.phantom import phantom
from tasl_lab.lab.lesson import recorded_run, records

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "nbs" / "lessons").glob("[0-9]*.ipynb"))
OLD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}  # a laptop's processor of 2013
TRAINS = {1, 4, 10}  # lessons that the slow tier runs so


def old(*command, **more):
    "A command on a machine without AMX, bf16 and GPU, as far as the environment can make one."
    env = os.environ | OLD | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | more
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")


# --- recorded runs --------------------------------------------------------------------------------------------------------------------

def test_records_know_their_pictures_whatever_their_last_digit_and_no_others():
    near, other = phantom(600, size=64, seed=0), phantom(600, size=64, seed=1)
    near.images += (near.images < 255).astype(np.uint8)
    runs = {p.parent: read_json(p) for p in records().glob("*/run.json")}
    assert len(runs) > 10 and near.sha256 not in {r["data"]["sha256"] for r in runs.values()}
    for folder, run in runs.items():
        config = PretrainConfig.of(**run["config"])
        assert recorded_run(config, near) == folder and recorded_run(config, other) is None


# --- without AMX and bf16 -------------------------------------------------------------------------------------------------------------

def test_the_switch_takes_effect(tmp_path):
    "A run of two steps under it is recorded as fp32, oneDNN says that it keeps to AVX2, and PyTorch's own kernels do."
    code = ("import torch\nfrom tasl_lab.config import PretrainConfig\nfrom tasl_lab.data.phantom import phantom\nfrom tasl_lab.training import pretrain\n"
            "print('pytorch:', torch.backends.cpu.get_cpu_capability())\n"
            f"for _ in pretrain(PretrainConfig.of(objective='spark', steps=2, batch=4), phantom(20, size=16, seed=0), {str(tmp_path / 'run')!r}): pass")
    made = old(sys.executable, "-c", code, ONEDNN_VERBOSE="1")
    assert made.returncode == 0, made.stderr[-2000:]
    assert read_json(tmp_path / "run" / "run.json")["precision"] == "fp32" and read_json(tmp_path / "run" / "run.json")["device"] != "cuda"
    told = re.findall(r"onednn_verbose.*info,cpu,isa:(.+)", made.stdout)
    assert "exec,cpu" in made.stdout and not [line for line in made.stdout.splitlines() if "exec,cpu" in line and "bf16" in line]
    if platform.machine() in ("x86_64", "AMD64"): assert told[0].strip() == "Intel AVX2" and re.search("^pytorch: (AVX2|DEFAULT)$", made.stdout, re.M), told


def passes(path):
    done = old("nbdev-test", "--n-workers", "0", "--cell-timeout", "1800", path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in LESSONS if int(p.name[:2]) in TRAINS], ids=lambda p: p.stem)
def test_a_lesson_that_trains_passes_in_fp32(path): passes(path)


@pytest.mark.full
@pytest.mark.parametrize("path", [p for p in LESSONS if int(p.name[:2]) not in TRAINS], ids=lambda p: p.stem)
def test_every_other_lesson_passes_in_fp32(path): passes(path)
