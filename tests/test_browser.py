"""The Lab in a real JupyterLab: choose, train, stop while another cell runs, resume, and end with the loss of a run that was never stopped."""
import json
import os
import re
import time
from pathlib import Path

import pytest
from browser import chromium, notebook, server, snap

PATIENCE = float(os.environ.get("TASL_PATIENCE", "1"))  # as in tiers.py: every wait, and the second that a stop may take, times this
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * PATIENCE)]

SMALL = {"size": "32", "pictures": "150", "steps": "60", "out": "'runs'"}
BLOCK = "import os, pathlib\npathlib.Path('begun').touch()\nwhile not os.path.exists('go on'): sum(range(1000))  # a cell that keeps the main thread busy"
COMPARE = """
import json
from tasl_lab.training import pretrain
job = lab.panels['Train'].shown
through = [s.loss for s in pretrain(job.config, lab.session.data, device='cpu')]
print(json.dumps({'objective': job.config.objective, 'status': job.status, 'losses': [r['loss'] for r in job.rows], 'through': through, 'latency': latency,
                  'problems': lab.session.problems, 'probes': [p['step'] for p in job.probes]}))
"""


def lesson(root: Path, folder: Path) -> int:
    "The lab notebook with small settings and the cells of this test; returns the index of the cell that opens the Lab."
    nb = json.loads((root / "nbs" / "lessons" / "00_lab.ipynb").read_text())
    for c in nb["cells"]:
        c["outputs"] = [] if c["cell_type"] == "code" else c.get("outputs")
        if "tags" in c["metadata"]:
            c["source"] = re.sub(r"^(\w+) = [^#]*", lambda m: f"{m[1]} = {SMALL[m[1]]}  " if m[1] in SMALL else m[0], "".join(c["source"]), flags=re.M)
        if c["cell_type"] == "markdown": c.pop("outputs", None)
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] == "code"][:3]
    nb["cells"] += [{"cell_type": "code", "id": f"test{k}", "metadata": {}, "outputs": [], "execution_count": None, "source": s}
                    for k, s in enumerate((BLOCK, "latency = lab.panels['Train'].shown.rested - lab.panels['Train'].shown.asked", COMPARE))]
    (folder / "lab.ipynb").write_text(json.dumps(nb))
    return 2


def shown(nb, pattern: str, seconds: float) -> re.Match:
    "Wait until a status of the Lab says so."
    end, text = time.monotonic() + seconds * PATIENCE, []
    while time.monotonic() < end:
        text = nb.page.locator(".tasl [role=status]").all_inner_texts()
        if m := re.search(pattern, "\n".join(text)): return m
        nb.page.wait_for_timeout(30)
    raise AssertionError(f"{pattern!r} was not shown in {seconds * PATIENCE:.0f} s: {text}")


def press(nb, name: str):
    "Press the button of this name in the Lab."
    nb.page.locator(".tasl button:visible", has_text=re.compile(rf"^\s*{name}\s*$")).click(timeout=30_000 * PATIENCE)


def tab(nb, name: str, there: str):
    "Open a tab and wait for a part of it."
    nb.page.get_by_role("tab", name=name, exact=True).click()
    nb.page.wait_for_selector(there, timeout=60_000 * PATIENCE)


def test_choose_train_stop_resume(root, tmp_path, shots):
    chromium()
    work = tmp_path / "work"
    work.mkdir()
    cell = lesson(root, work)
    with server(work, tmp_path, PATIENCE) as address, notebook(address, "lab.ipynb", patience=PATIENCE) as nb:
        page, began = nb.page, time.monotonic()
        for k in range(cell + 1): nb.run(k)
        page.wait_for_selector(".tasl select", timeout=60_000 * PATIENCE)
        first = time.monotonic() - began
        page.wait_for_selector(".tasl figure img", timeout=60_000 * PATIENCE)
        pictures = time.monotonic() - began
        nb.idle()
        page.evaluate("() => document.querySelector('.tasl').scrollIntoView()")
        snap(page, shots / "choose_light.png")
        page.locator(".tasl .widget-select select").select_option(label="SparK")
        shown(nb, "objective spark", 30)

        tab(nb, "Audit", ".tasl button:visible")
        press(nb, "Audit")
        page.wait_for_selector("table[aria-label='Findings of the audit'], .tasl p:has-text('No finding')", timeout=60_000 * PATIENCE)
        page.wait_for_selector(".tasl table[aria-label='Pictures before and after'] img", timeout=60_000 * PATIENCE)
        snap(page, shots / "audit_light.png")

        tab(nb, "Train", ".tasl svg[role=img]")
        press(nb, "Train")
        shown(nb, r"training, step ([3-9]|\d\d) of", 120)
        nb.run(cell + 1)
        while not (work / "begun").exists(): page.wait_for_timeout(50)
        at = time.monotonic()
        press(nb, "Stop")
        m = shown(nb, r"stopped, step (\d+) of (\d+)", 30)
        stopped, still_busy = time.monotonic() - at, nb.running(cell + 1)
        (work / "go on").touch()
        print(f"stop {stopped:.2f} s in the browser, {m[0]}")
        assert still_busy, "the other cell had ended: the stop was not tested"
        assert int(m[1]) < int(m[2]) and stopped < PATIENCE, f"stopped after {stopped:.2f} s at step {m[1]}"
        nb.idle()
        nb.run(cell + 2)
        nb.idle()

        press(nb, "Resume")
        shown(nb, r"finished, step (\d+) of \1", 240)
        page.evaluate("() => document.querySelector('.tasl').scrollIntoView()")
        snap(page, shots / "train_light.png")
        nb.run(cell + 3)
        while not nb.output(cell + 3): page.wait_for_timeout(200)
        found = json.loads(nb.output(cell + 3))
        assert found["objective"] == "spark" and found["losses"] == found["through"] and not found["problems"]
        assert found["latency"] < PATIENCE and found["probes"][0] == 0 and found["probes"][-1] == len(found["losses"])

        nb.theme("JupyterLab Dark")
        page.evaluate("() => document.querySelector('.tasl').scrollIntoView()")
        snap(page, shots / "train_dark.png")
        tab(nb, "Choose", ".tasl .widget-select select")
        snap(page, shots / "choose_dark.png")
        print(f"first controls {first:.1f} s, first views {pictures:.1f} s, stop {stopped:.2f} s in the browser, {found['latency']:.2f} s in the kernel")
        assert not nb.errors, nb.errors
