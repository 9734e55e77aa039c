"""Every panel of the Lab in both themes of a real JupyterLab, with its pictures for the docs.

    TASL_SHOTS=nbs/09_lab/images python -m pytest -m slow tests/test_browser_panels.py    writes the pictures of `nbs/09_lab/09b_pictures.ipynb` anew
"""
import json
import os
import re

import pytest
from browser import chromium, notebook, server, snap
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from test_browser import press, shown, tab
from test_browser_explore import coloured, lasso, problems

PATIENCE = float(os.environ.get("TASL_PATIENCE", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * PATIENCE)]

OPEN = """
from tasl_lab.config import PretrainConfig
from tasl_lab.data.sources import sample
from tasl_lab.lab import Lab
lab = Lab(sample('brain'), PretrainConfig.of(objective='simclr+0.5*masked', steps=24, batch=32, watch=6), out='runs', every=8, labels=60, supervised=20)
lab
"""


def opened(folder):
    "A notebook of one cell that opens the Lab."
    cell = {"cell_type": "code", "id": "lab", "metadata": {}, "outputs": [], "execution_count": None, "source": OPEN.strip()}
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (folder / "lab.ipynb").write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def into_view(nb, where):
    "Bring an element to the top of the notebook, and let it settle."
    where.evaluate("e => e.scrollIntoView({block: 'start'})")
    nb.page.wait_for_timeout(400)


class Shots:
    "Pictures of a place of the Lab in both themes."
    def __init__(self, nb, folder): self.nb, self.folder, self.made = nb, folder, []

    def __call__(self, name, where=None):
        whole = self.nb.page.locator(".tasl").first
        for theme in ("Light", "Dark"):
            self.nb.theme(f"JupyterLab {theme}")
            into_view(self.nb, where or whole)
            self.nb.page.wait_for_timeout(1200)
            self.made.append(snap(self.nb.page, self.folder / f"{name}_{theme.lower()}.png", where or whole))
        self.nb.theme("JupyterLab Light")
        into_view(self.nb, where or whole)


def look(nb, there: str, seconds: float = 120):
    "Wait for an element that is seen."
    nb.page.locator(there).locator("visible=true").first.wait_for(timeout=1000 * seconds * PATIENCE)
    nb.page.wait_for_timeout(800)
    return nb.page.locator(there).locator("visible=true").first


def lassoed(nb):
    "Draw around points until their pictures are shown: a busy machine loses movements of the mouse."
    for attempt in range(5):
        into_view(nb, nb.page.locator(".tasl").first)
        lasso(nb.page, nb.page.locator(".tasl .js-plotly-plot:visible").first)
        try: return look(nb, ".tasl canvas[aria-label^='Selected pictures. ']", 15)
        except PlaywrightTimeout:
            if attempt == 4: raise


def choose(nb, name: str):
    "Press one of several toggles."
    nb.page.locator(".tasl .widget-toggle-buttons button:visible", has_text=re.compile(rf"^\s*{name}\s*$")).first.click(timeout=30_000 * PATIENCE)


def test_every_panel_in_both_themes(tmp_path, shots):
    chromium()
    work = tmp_path / "work"
    work.mkdir()
    opened(work)
    with server(work, tmp_path, PATIENCE) as address, notebook(address, "lab.ipynb", (1280, 1100), PATIENCE) as nb:
        page, both = nb.page, Shots(nb, shots)
        nb.run(0)
        look(nb, ".tasl figure img")
        nb.idle(120)
        both("choose")

        tab(nb, "Audit", ".tasl button:visible")
        press(nb, "Audit")
        look(nb, ".tasl table[aria-label='Pictures before and after'] img", 240)
        both("audit")

        tab(nb, "Train", ".tasl svg[role=img]")
        press(nb, "Train")
        shown(nb, r"finished, step (\d+) of \1", 300)
        press(nb, "Baseline")
        shown(nb, r"supervised on cnn-tiny, seed 0: finished", 300)
        page.locator(".tasl .widget-dropdown:visible", has_text="Run shown").locator("select").select_option(index=0)
        shown(nb, r"finished, step (\d+) of \1", 30)
        assert page.locator(".tasl svg[role=img]:visible").first.get_attribute("aria-label").count("supervised") == 1
        both("train")

        tab(nb, "Explore", ".tasl .js-plotly-plot .nsewdrag")
        page.wait_for_timeout(2000)
        sheet = lassoed(nb)
        sheet.click(position={"x": 30, "y": 30})
        look(nb, ".tasl canvas[aria-label^='Picture ']")
        both("explore")
        assert coloured(page, sheet) > 40
        choose(nb, "paint a lesion")
        paint = look(nb, ".tasl canvas[aria-label^='The picture to paint on']", 240)
        paint.click(position={"x": 60, "y": 60})
        page.wait_for_timeout(2500)
        both("paint", page.locator(".tasl h3:has-text('Paint a lesion')").locator("xpath=ancestor::div[contains(@class, 'tasl')][1]"))

        tab(nb, "Compare", ".tasl h3:has-text('Compare')")
        page.wait_for_timeout(3000)
        lassoed(nb)
        both("compare")
        press(nb, "Segmentation")
        masks = look(nb, ".tasl canvas[aria-label^='true mask: ']", 240)
        both("segmentation", page.locator(".tasl h3:has-text('Segmentation')").locator("xpath=ancestor::div[contains(@class, 'tasl')][1]"))
        assert coloured(page, masks) > 40

        tab(nb, "Decide", ".tasl button:visible")
        look(nb, ".tasl .tasl-paper .main-svg")
        both("decide")
        choose(nb, "advisor")
        shown_tree = look(nb, ".tasl details summary")
        both("advisor")
        assert shown_tree.inner_text() == "The advice in full"
        choose(nb, "gate")
        look(nb, ".tasl :text('recorded elsewhere, not on this set')")      # the gate of the repository's own record
        assert "stage 1" in look(nb, ".tasl .tasl-paper").text_content()
        assert len(both.made) == 18 and max(p.stat().st_size for p in both.made) < 120_000
        assert not problems(nb), nb.errors
