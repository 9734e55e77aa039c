"""The project's own tools: tiers of tests, documentation, package."""
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from tiers import TIERS, Stage, report, run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs"] = module
    spec.loader.exec_module(module)
    return module


# --- tiers ----------------------------------------------------------------------------------------------------------------------------

def test_a_stage_is_held_to_its_allowance():
    assert run(Stage("good", "true", 5))[1] == "ok"
    assert "exit status 3" in run(Stage("bad", "exit 3", 5))[1]
    assert "more than 1.5 times" in run(Stage("slow", "sleep .5", .25))[1]
    seconds, result = run(Stage("stuck", "sleep 30", .1))
    assert "stopped" in result and seconds < 5
    assert run(Stage("slow", "sleep .5", .25), patience=2)[1] == "ok"


def test_the_report_names_every_stage():
    stage = Stage("good", "true", 5)
    assert re.search(r"fast +good +1\.0 +5 +ok", report([("fast", stage, 1., "ok")], 1.))


def test_the_tiers_fit_their_promise():
    "The fast tier stays within 15 minutes, the slow one within 30."
    assert sum(s.allowance for s in TIERS["fast"]) <= 15 * 60 and sum(s.allowance for s in TIERS["slow"]) <= 30 * 60


# --- documentation --------------------------------------------------------------------------------------------------------------------

def notebook(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(t) for t in texts]), path)


def test_pages_are_ordered_and_named_as_nbdev_names_them(docs, tmp_path):
    for name in ("lessons/01_first.ipynb", "11_cli.ipynb", "02_views.ipynb", "01_data/00_set.ipynb", "index.ipynb", "00_core.ipynb"):
        notebook(tmp_path / name, f"# {name}\n> About it,\n> in two lines.")
    found = docs.pages(tmp_path)
    assert [p.href for p in found] == ["index.html", "core.html", "01_data/set.html", "views.html", "cli.html", "lessons/first.html"]
    assert found[1].summary == "About it, in two lines." and [*docs.grouped(found)][1] == "1 Data"


def test_links_between_notebooks_become_links_between_pages(docs, tmp_path):
    notebook(tmp_path / "01_data" / "00_set.ipynb", "# Set\n> s", "[views](../02_views.ipynb#Crops)")
    notebook(tmp_path / "02_views.ipynb", "# Views\n> v")
    found = docs.pages(tmp_path)
    text, problem = docs.render(tmp_path, found[0], found)
    assert not problem and 'href="../views.html#Crops"' in text and text.count("<h1") == 1


def test_a_broken_link_is_found(docs, tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="here">x</h2><a href="#here">ok</a><a href="b.html#there">no anchor</a><img src="gone.png">'
                                     '<a href="https://example.org/x">outside</a>')
    (tmp_path / "b.html").write_text("<p>nothing</p>")
    assert docs.broken_links(tmp_path) == ["a.html -> b.html#there", "a.html -> gone.png"]


# --- package --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_wheel_holds_the_whole_library(tmp_path):
    for name in ("tasl_lab", "nbs/experiments", "nbs/lessons", "data_samples/runs", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else: shutil.copy(source, tmp_path / name)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", tmp_path], check=True, capture_output=True)
    inside = set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tasl_lab").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert expected <= inside and any(name.endswith("entry_points.txt") for name in inside)
    assert any(name.endswith("share/tasl_lab/experiments/alignment.ipynb") for name in inside)
