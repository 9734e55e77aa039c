"""The main job on what a user brings: from a folder to a report and to numbers, by one command."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CELL = {"arm", "task", "metric", "budget", "mean", "low", "high", "vs_random", "verdict_random", "informative", "pictures", "seconds", "by_seed"}
SEED = {"seed", "value", "metrics", "per_image", "pictures", "encoded", "seconds"}


def demo(data: Path, out: Path) -> dict:
    "Runs the demo's smallest preset on a folder; returns what it wrote for the one set."
    command = [str(Path(sys.executable).parent / "tasl"), "demo", "--data", str(data), "--preset", "smoke", "--out", str(out), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "smoke" in (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["data"][0]


def check(found: dict, tasks: set[str]):
    "Every arm, task and seed has its metric, its interval, per-image scores and cost."
    cells = found["cells"]
    assert {c["task"] for c in cells} == tasks and {c["arm"] for c in cells} == {"simclr", "simclr again", "spark", "random", "supervised"}
    for c in cells:
        assert set(c) >= CELL and len(c["by_seed"]) == c["seeds"] == 2 and c["low"] <= c["mean"] <= c["high"]
        for s in c["by_seed"]:
            assert set(s) >= SEED and np.isfinite(s["value"]) and len(s["per_image"]["id"]) > 1
            assert (s["pictures"] > 0) == (c["arm"] != "random")


@pytest.mark.full
def test_photographs_with_boxes(extra_data, tmp_path):
    check(demo(extra_data("bccd"), tmp_path / "out"), {"classification:contains", "detection:boxes"})


@pytest.mark.slow
def test_pictures_with_masks_beside_them(tmp_path):
    r = np.random.default_rng(0)
    for kind in ("images", "masks"): (tmp_path / "mine" / kind).mkdir(parents=True)
    y, x = np.mgrid[:32, :32]
    for i in range(90):
        cy, cx = r.uniform(8, 24, 2)
        mask = (y - cy) ** 2 + (x - cx) ** 2 < 16
        Image.fromarray((r.normal(90, 12, (32, 32)) + 60 * mask).clip(0, 255).astype(np.uint8)).save(tmp_path / "mine" / "images" / f"{i:03d}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "mine" / "masks" / f"{i:03d}.png")
    found = demo(tmp_path / "mine", tmp_path / "out")
    tasks = {c["task"] for c in found["cells"]}
    assert {"segmentation:regions", "detection:boxes"} <= tasks
    check(found, tasks)
