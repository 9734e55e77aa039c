"""The report: one page, complete in itself, that says what its tables say and nothing that a name smuggles in."""
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from tasl_lab.batch.report import SECTIONS, bibtex, methods, objectives_in, summary, synthetic_results, write_report, write_summary
from tasl_lab.core import InputError
from tasl_lab.figures import matrix, style

LIMIT = 8e6  # bytes
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data", "use": "href"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    "Tags of a page outside its scripts, with what it loads."
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids.add(attrs.get("id"))
        if attrs.get(LOADS.get(tag)): self.loads.append(attrs[LOADS[tag]])

    def named(self, tag): return [a for t, a in self.tags if t == tag]


@pytest.fixture(scope="module")
def results():
    made = synthetic_results()
    return made | {"methods": methods(made), "bibtex": bibtex(objectives_in(["simclr", "spark"]))}


@pytest.fixture(scope="module")
def text(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("report") / "new" / "report.html").read_text()


def test_page_is_complete_and_small(text):
    page = Page(text)
    assert len(text.encode()) < LIMIT
    assert [load for load in page.loads if not load.startswith("data:")] == []
    assert "default-src 'none'" in next(a["content"] for a in page.named("meta") if "http-equiv" in a)
    assert len([a for a in page.named("script") if a.get("type") != "application/json"]) == 2, "Plotly once, and the page's own"


def test_every_section_is_there_and_linked(text):
    page = Page(text)
    wanted = {"summary", *SECTIONS}
    assert wanted <= page.ids
    assert {a["href"] for a in page.named("a")} == {f"#{i}" for i in wanted}


def test_figures_and_pictures_have_words(text):
    page = Page(text)
    plots = [a for a in page.named("div") if a.get("class") == "plot"]
    assert len(plots) == 11 and all(len(a["aria-label"]) > 30 and a["data-figure"] in page.ids for a in plots)
    assert all(a["alt"] for a in page.named("img"))
    assert len(page.named("figure")) == len(page.named("figcaption")) == len(plots) + len(page.named("img"))
    assert all(a["scope"] in ("col", "row") for a in page.named("th"))


PARTS = ["cells", "factors", "comparisons", "history", "embedding", "attention", "reconstructions", "data", "runs", "gate"]


@pytest.mark.parametrize("missing", PARTS)
def test_missing_parts_are_left_out(results, missing, tmp_path):
    page = Page(write_report({k: v for k, v in results.items() if k != missing}, tmp_path / "r.html").read_text())
    gone = {"cells": {"matrix", "forest"}, "runs": {"budget"}, "factors": set(), "comparisons": set()}.get(missing, {missing})
    assert {"summary", *SECTIONS} - page.ids == gone


def test_empty_results_make_a_page(tmp_path):
    assert "<h1>TASL Lab report</h1>" in write_report({"cells": pd.DataFrame(), "data": []}, tmp_path / "r.html").read_text()


def test_names_cannot_smuggle_markup(results, tmp_path):
    bad = {**results, "title": EVIL, "findings": [EVIL], "stamps": [EVIL], "command": EVIL, "environment": {EVIL: EVIL}}
    bad["config"] = {EVIL: EVIL}
    for key in ("cells", "factors", "comparisons", "history", "runs"):
        bad[key] = results[key].replace({"phantom": EVIL, "spark": EVIL})
    bad["data"] = [{**e, "name": EVIL, "note": EVIL} for e in results["data"]]
    bad["attention"] = {EVIL: results["attention"]["brain"]}
    bad["embedding"] = {EVIL: results["embedding"]["brain"]}
    text = write_report(bad, tmp_path / "r.html").read_text()
    assert "<script>alert" not in text and "<img src=x" not in text
    assert not [a for _, a in Page(text).tags if "onerror" in a]


def test_summary_is_honest(results):
    said = summary(results)
    assert "24 blocks of one template" in said["brain"][0] and "not a cohort" in said["brain"][0]
    assert "120 patients" in said["phantom"][0] and "template" not in said["phantom"][0]
    assert "controls random and supervised" in said[""][0]
    counts = matrix.verdict_counts(results["cells"]).query("data == 'brain' and arm not in ('random', 'supervised')")
    for word in style.VERDICTS:
        n = int(counts[word].sum())
        assert not n or re.search(rf"\b{n} (could show nothing|{word})", said["brain"][1]), word


def test_no_difference_is_said(results):
    cells = results["cells"].assign(verdict_random="undecided", informative=True)
    said = " ".join(summary({"cells": cells})["brain"])
    assert "18 undecided (no difference shown, which is not a tie)" in said and said.count("no difference shown (6 undecided)") == 3
    assert " better" not in said.split("Against supervised")[0]


def test_wrong_input_is_one_clear_error(results, tmp_path):
    out, maps = tmp_path / "r.html", results["embedding"]["brain"]
    with pytest.raises(InputError, match="no part called 'celery'"): write_report({"celery": 1}, out)
    with pytest.raises(InputError, match="cells table lacks task"): write_report({"cells": results["cells"].drop(columns="task")}, out)
    with pytest.raises(InputError, match="shape"): write_report({"embedding": {"brain": {**maps, "color": [1, 2]}}}, out)
    assert not out.exists()


def test_one_arm_one_task_without_supervised(results, tmp_path):
    cells = results["cells"].query("data == 'brain' and arm in ('simclr', 'random') and budget == 64 and task == 'detection:boxes'")
    cells = cells[[c for c in cells if "supervised" not in c]]
    page = Page(write_report({"cells": cells}, tmp_path / "r.html").read_text())
    assert len([a for a in page.named("div") if a.get("class") == "plot"]) == 2


def test_pictures_can_be_left_out(results, tmp_path):
    "No picture of the data, and everything else as before."
    page = Page(write_report(results, tmp_path / "r.html", show=False).read_text())
    assert page.named("img") == [] and len([a for a in page.named("div") if a.get("class") == "plot"]) == 11
    assert {"summary", *SECTIONS} - page.ids == {"attention", "reconstructions"} and results["data"][0]["samples"] is not None


def test_words_for_a_paper_hold_what_the_tables_say(results):
    said = methods(results)
    parts = ("SimCLR (arXiv:2002.05709)", "100 steps of 128 pictures", "3 random seeds", "64 and 1,024 labelled pictures", "brain and phantom")
    assert [part for part in parts if part not in said] == []
    entries = bibtex(["simclr"])
    assert "@misc{simclr2020," in entries and "eprint = {2002.05709}" in entries and entries.count("{") == entries.count("}")


def test_summary_for_machines(results, tmp_path):
    import json
    told = json.loads(write_summary(results, tmp_path / "s.json").read_text())
    assert len(told["cells"]) == len(results["cells"]) and {r["seconds per run (s)"] for r in told["budget"]} == {11.}
    assert told["gate"]["phantom"]["savings"][2]["pictures"] == .45 and told["methods"] == results["methods"] and "samples" not in told["data"][0]


def test_command_reads_folders(tmp_path):
    "Runs are found, a matrix's record too; what is not there is told."
    import json

    from test_cli import call, refused
    from test_runs import folder
    folder(tmp_path / "runs" / "a")
    folder(tmp_path / "runs" / "b", "stopped", objective="byol")
    for state in ("a", "b"):
        table = pd.read_parquet(tmp_path / "runs" / state / "metrics.parquet")
        table.assign(pictures=table.step * 16, seconds=table.step * .5).to_parquet(tmp_path / "runs" / state / "metrics.parquet")
    told = json.loads(call("report", tmp_path / "runs", "--out", tmp_path / "page.html", "--json").stdout)
    assert told["sections"] == ["history", "budget", "paper", "again"] and "SimCLR" in (tmp_path / "page.html").read_text()
    assert {r["arm"] for r in json.loads((tmp_path / "page.json").read_text())["budget"]} == {"simclr", "byol"}
    (tmp_path / "empty").mkdir()
    refused("report", tmp_path / "empty", "--out", tmp_path / "no.html", says="holds no run")
    refused("report", tmp_path / "nothing", says="no such folder")
    refused("report", tmp_path / "runs", "--out", tmp_path / "page.pdf", says=".html")


@pytest.mark.slow
@pytest.mark.skipif(style.browser_path() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 1600])
def test_page_in_a_browser(results, width, tmp_path):
    "Every figure is drawn, nothing is fetched, nothing is cut off, no text of a figure lies over another."
    sync_api = pytest.importorskip("playwright.sync_api")
    out = write_report(results, tmp_path / "r.html")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=style.browser_path(), headless=True, args=style._FLAGS)
        page, said, asked = browser.new_page(viewport={"width": width, "height": 720}), [], []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda q: asked.append(q.url))
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-drawn='11']")
        assert said == [] and [u for u in asked if not u.startswith(("data:", "blob:"))] == [out.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate(OVERLAPS)
        browser.close()
    assert found == {"overlaps": [], "cut": [], "small": []}


# Boxes of every text of a figure: two that lie over each other, one outside its figure, one below 13 px.
OVERLAPS = """() => {
  const overlaps = [], cut = [], small = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const frame = plot.getBoundingClientRect();
    const shown = (t) => t.textContent.trim() && t.getBoundingClientRect().width > 0;
    const texts = [...plot.querySelectorAll("svg.main-svg text")].filter(shown);
    const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect(), parseFloat(getComputedStyle(t).fontSize)]);
    boxes.forEach(([a, p, size], i) => {
      if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1 || p.bottom > frame.bottom + 1) cut.push(a);
      if (size < 13) small.push(a);
      for (const [b, q] of boxes.slice(i + 1)) {
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 2 && high > 3) overlaps.push(`${a} | ${b}`);
      }
    });
  }
  return { overlaps, cut, small };
}"""
