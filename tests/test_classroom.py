"""The classroom kit: versions as nbgrader makes them, nothing to read in a student's, folders that overwrite nobody, plans, bundles, rooms."""
import ast
import base64
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from unittest.mock import MagicMock

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from tasl_lab import cli
from tasl_lab.batch import classroom, lecture, room
from tasl_lab.batch.classroom import LEDGER, TOP, exercises, lessons, student, teacher
from tasl_lab.core import write_json
from tasl_lab.lab.lesson import Unsolved

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parent.parent
LESSONS = lessons(folder=ROOT / "nbs" / "lessons")
each = pytest.mark.parametrize("path", LESSONS, ids=[p.stem for p in LESSONS])


def call(*args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def read(path): return nbformat.read(path, as_version=4)


def region(source, name):
    "The lines between two marks."
    found = re.findall(rf"BEGIN {name}\n(.*?)\n[^\n]*END {name}", source, re.S)
    return [line.strip() for text in found for line in text.splitlines() if line.strip()]


# --- versions -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def nbgrader():
    "nbgrader's own steps, as `generate_assignment` takes them."
    reason = "nbgrader is not installed (it needs Python 3.11): that our versions equal its own was NOT checked"
    steps = pytest.importorskip("nbgrader.preprocessors", reason=reason)
    from nbgrader.nbgraderformat.v3 import MetadataValidatorV3

    def handed_out(nb):
        for step in (steps.ClearSolutions(), steps.ClearHiddenTests(), steps.ClearOutput(), steps.CheckCellMetadata()):
            nb = step.preprocess(deepcopy(nb), {})[0]
        return nb
    return handed_out, MetadataValidatorV3().validate_nb


@each
def test_versions_are_those_of_nbgrader(path, nbgrader):
    handed_out, validate = nbgrader
    ours, theirs = student(path), handed_out(teacher(path))
    for nb in (ours, teacher(path)): validate(nb)
    for a, b, c in zip(ours.cells, theirs.cells, read(path).cells, strict=True):
        if "Quiz(" not in c.source: assert (a.source, a.get("outputs"), a.metadata.get("nbgrader")) == (b.source, b.get("outputs"), b.metadata.get("nbgrader"))
    assert [c.source for c in teacher(path).cells] == [c.source for c in read(path).cells]


def test_the_validator_refuses_what_it_should(nbgrader):
    nb = teacher(LESSONS[1])
    for cell in [c for c in nb.cells if "nbgrader" in c.metadata][:1]: cell.metadata.nbgrader["grade_id"] = "not valid: a blank"
    with pytest.raises(Exception, match="grade_id|pattern|does not match"): nbgrader[1](nb)


def test_ids_are_unique_over_all_lessons():
    ids = [c.metadata["nbgrader"]["grade_id"] for p in LESSONS for c in teacher(p).cells if "nbgrader" in c.metadata]
    assert len(ids) == len(set(ids)) > 2 * len(LESSONS) and all(re.fullmatch(r"lesson\d\d-(exercise|check)\d", i) for i in ids)


def quizzes(source):
    "Arguments of every quiz of a cell."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Quiz"]
    return [[ast.literal_eval(a) for a in n.args] + [ast.literal_eval(k.value) for k in n.keywords] for n in calls]


@each
def test_nothing_that_solves_can_be_read_in_a_students_version(path):
    nb, handed = read(path), student(path)
    text = json.dumps(handed, ensure_ascii=False)
    tokens = " ".join(base64.b64decode(t).decode() for t in re.findall(r'Quiz\.sealed\(\\"([^"\\]+)', text))
    assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text and not any(c.get("outputs") for c in handed.cells)
    for before, after in zip(nb.cells, handed.cells, strict=True):
        gone = region(before.source, "SOLUTION") + region(before.source, "HIDDEN TESTS")
        assert not [line for line in gone if len(line) > 12 and line in after.source]
        for question, options, *_ in quizzes(before.source) if before.cell_type == "code" else []:
            assert question and not [why for why in options.values() if why in text + tokens]
            assert "right=" not in after.source


def test_the_quiz_of_a_students_version_answers_as_the_lesson_does():
    from tasl_lab.lab.lesson import Quiz
    cell = next(c.source for p in LESSONS for c in read(p).cells if c.source.startswith("Quiz("))
    (_, options, right), = quizzes(cell)
    handed = eval(classroom.sealed(cell), {"Quiz": Quiz})
    for option, why in options.items(): assert handed.answer(option) == f"{'Right' if option == right else 'Not yet'}: {why}"


class Mocks(dict):
    "A namespace in which whatever was not defined is a stand-in."
    def __missing__(self, name): return getattr(builtins, name) if hasattr(builtins, name) else MagicMock(name=name)


@each
def test_checks_fail_while_an_exercise_is_unsolved(path):
    from tasl_lab.lab.lesson import solved
    nb, start = student(path), time.process_time()
    for place, check in exercises(read(path)):
        names = Mocks(solved=solved)
        try: exec(nb.cells[place].source, names)
        except NotImplementedError: pass
        with pytest.raises((Unsolved, NotImplementedError)): exec(nb.cells[check].source, names)
    assert time.process_time() - start < 10 * float(os.environ.get("TASL_PATIENCE", "1"))


def test_an_exercise_whose_check_asks_for_nothing_would_be_noticed():
    "A check that does not look passes on stand-ins, which the test above takes for a failure."
    with pytest.raises(pytest.fail.Exception), pytest.raises(Unsolved): exec("solved(mine=mine)\nassert mine", Mocks(solved=lambda **kw: None))


# --- a folder for the class -----------------------------------------------------------------------------------------------------------

def test_lab_lays_lessons_and_keeps_what_was_changed(tmp_path):
    first = call("lab", tmp_path / "mine", "--copy-only", "--json")
    assert first.exit_code == 0, first.output
    laid, top = json.loads(first.stdout)["files"], tmp_path / "mine"
    assert set(laid.values()) == {"new"} and {Path(n).parts[0] for n in laid} == {TOP}
    assert {p.name for p in (top / TOP / "lessons").iterdir()} == {p.name for p in LESSONS}
    mine = top / TOP / "lessons" / LESSONS[1].name
    work = mine.read_text(encoding="utf-8").replace("raise NotImplementedError()", "done = True", 1)
    mine.write_text(work, encoding="utf-8")
    taught = call("lab", top, "--teacher", "--copy-only")       # another version of everything
    assert taught.exit_code == 0 and "was changed here and is kept; the new version is" in taught.output
    assert mine.read_text(encoding="utf-8") == work and "BEGIN SOLUTION" in mine.with_name(f"{mine.stem}.new.ipynb").read_text(encoding="utf-8")
    assert (top / TOP / "lessons" / "90_teaching.ipynb").is_file() and (top / TOP / "lessons" / "plans.yaml").is_file()
    assert "kept" in call("lab", top, "--teacher", "--copy-only").output and len(list(mine.parent.glob("*.new*"))) == 1


def test_lab_opens_jupyterlab_on_the_lessons(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: called.append(command) or 0)
    assert call("lab", tmp_path, "--no-browser").exit_code == 0
    (command,) = called
    assert command[1:3] == ["-m", "jupyterlab"] and f"--notebook-dir={tmp_path.resolve()}" in command and "--no-browser" in command
    assert f"--LabApp.default_url=/lab/tree/{TOP}/lessons" in command and (tmp_path / TOP / "lessons" / LESSONS[0].name).is_file()


def test_lab_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    found = call("lab", tmp_path / "file", "--copy-only")
    assert found.exit_code == 2 and "is a file: name a folder" in found.stderr


@each
def test_what_a_lesson_reads_is_handed_out(path, tmp_path_factory):
    "Paths of tables that a lesson spells out are there in a working folder."
    spelled = {m for c in read(path).cells if c.cell_type == "code" for m in re.findall(r"\.\./experiments/results/[\w./-]+\.(?:json|parquet)", c.source)}
    laid = classroom._needed(ROOT / "nbs" / "experiments")
    assert {f"{TOP}/{s.removeprefix('../')}" for s in spelled} <= set(laid)


def test_nbgrader_gets_its_folders(tmp_path):
    found = call("classroom", "nbgrader", tmp_path, "--lessons", "1,6")
    assert found.exit_code == 0, found.output
    names = [p.stem for p in LESSONS if classroom.number_of(p) in (1, 6)]
    assert sorted(p.name for p in (tmp_path / "source").iterdir()) == names == sorted(p.name for p in (tmp_path / "release").iterdir())
    for name in names:
        source, release = (json.dumps(read(tmp_path / kind / name / f"{name}.ipynb")) for kind in ("source", "release"))
        assert "BEGIN SOLUTION" in source and "BEGIN SOLUTION" not in release and "../experiments" not in source + release
        assert "Quiz.sealed" in source and "Quiz.sealed" in release
    assert (tmp_path / LEDGER).is_file() and call("classroom", "nbgrader", tmp_path, "--lessons", "one").exit_code == 2


# --- plans ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["90", "day"])
def test_a_plan_names_sections_that_its_lessons_have(name):
    found = lecture.plan(name)
    assert found["parts"][-1]["until"] == found["minutes"] and (name == "day" or found["minutes"] == 90)
    for n in {p["lesson"] for p in found["parts"] if "lesson" in p}:
        ends = [p["to"] for p in found["parts"] if p.get("lesson") == n]
        assert all(len(r) for r in lecture.portions(read(classroom.lesson(n)), ends, str(n)))
    told = call("classroom", "plan", name).output
    assert f"{found['parts'][-1]['from']}-{found['minutes']}" in told


def test_the_rubric_gives_a_hundred_points():
    assert lecture.rubric().points.sum() == 100 and lecture.rubric().notna().all().all()


def test_a_rehearsal_that_is_late_is_a_failed_command(monkeypatch):
    late = [lecture._row({"from": 0, "until": 1, "minutes": 1, "lesson": 1, "to": "Why?", "done": "x"}, 31.)]
    monkeypatch.setattr(lecture, "rehearse", lambda *a, **kw: late)
    found = call("classroom", "rehearse", "90", "-q")
    assert found.exit_code == 1 and "FAILED" in found.output and "31.0 s of 30 s" in found.output and "NOT READY" in found.output
    late[0] = lecture._row({k: late[0][k] for k in ("from", "until", "minutes", "lesson", "to", "done")}, 29.)
    assert call("classroom", "rehearse", "90", "-q").exit_code == 0


@pytest.mark.slow
def test_the_ninety_minutes_are_kept():
    found = call("classroom", "rehearse", "90", "-q", "--json")
    rows = json.loads(found.stdout)["parts"]
    assert found.exit_code == 0 and all(r["ok"] for r in rows), found.stdout
    assert sum("lesson" in r and r["seconds"] > 0 for r in rows) == sum("lesson" in p for p in lecture.plan("90")["parts"]) >= 4


@pytest.mark.parametrize("pairs, teach", [(213., "replay"), (214., "live")])
def test_doctor_picks_live_or_replay(pairs, teach, monkeypatch):
    monkeypatch.setattr(lecture, "pace", lambda device: lecture.verdict_of(pairs))
    found = call("doctor")
    assert re.search(rf"^teach +{teach}$", found.output, re.M) and "a class waits 120 s" in found.output
    assert json.loads(call("doctor", "--json").stdout)["class"]["teach"] == teach
    assert "class" not in json.loads(call("doctor", "--no-pace", "--json").stdout)


# --- a room of laptops ----------------------------------------------------------------------------------------------------------------

ARMS = {"simclr": .06, "spark": .0, "random": -.1, "supervised": .1}
CONFIG = {"objectives": ["simclr", "masked"], "tasks": ["classification:class"], "labels": [24], "draws": 1, "steps": 5, "batch": 8, "again": False,
          "ceiling": False, "seeds": 1}


def laptop(folder, seed, whole=True, **config):
    "What a laptop hands in: made-up cells of thirty patients."
    top, r = Path(folder) / f"seed-{seed}" / "phantom", np.random.default_rng(seed)
    patients = np.random.default_rng(99).normal(0, .1, 30)
    for arm, gain in ARMS.items():
        item = top / f"{arm}-s{seed}-00000000"
        cell = .7 + gain + r.normal(0, .02) + patients + r.normal(0, .04, 30)
        about = {"arm": arm, "seed": seed, "task": "classification:class", "budget": 24, "draw": 0, "condition": "internal", "metric": "auroc"}
        item.mkdir(parents=True)
        pd.DataFrame({"group": [f"p{k:02d}" for k in range(30)], "cell": cell}).assign(**about).to_parquet(item / "cells.parquet")
        task = {"task": "classification:class", "budget": 24} if arm == "supervised" else {"task": None, "budget": None}
        done = {"item": {"arm": arm, "seed": seed, "objective": None} | task, "cost": {}, "seconds": {}}
        if whole or arm != "supervised": write_json(item / "item.json", done)
    record = {"config": CONFIG | {"first": seed} | config, "data": "phantom", "sha256": "0" * 8, "group": "patient", "note": ""}
    write_json(top / "matrix.json", record | {"items": sorted(p.name for p in top.iterdir())})
    return top


def test_seeds_of_a_room_are_merged_and_the_interval_narrows(tmp_path):
    for seed in (3, 11): laptop(tmp_path / "in", seed)
    half = laptop(tmp_path / "in", 5, whole=False)
    found = call("classroom", "collect", tmp_path / "in", "--out", tmp_path / "hall", "--json")
    told = json.loads(found.stdout)
    assert found.exit_code == 0 and sorted(told["seeds"]) == [3, 11] and "1 of 4 left" in told["waiting"][0]
    shutil.rmtree(half)
    for seed in (5, *range(20, 28)): laptop(tmp_path / "in", seed)
    laptop(tmp_path / "other", 40, steps=6)
    found = call("classroom", "collect", tmp_path / "in", tmp_path / "other", "--out", tmp_path / "hall")
    assert "left out" in found.output and "another steps" in found.output and (tmp_path / "hall" / "room.html").is_file()
    table = room.narrowing(tmp_path / "hall")
    assert list(table.newest[:2]) == sorted(told["seeds"], key=told["seeds"].index) and len(table) == 11
    width = (table.high - table.low).to_numpy()
    assert width[-1] < .5 * width[1] and table.covers.iloc[0] == "patients" and table.outcome.iloc[-1] == "better"
    last, results = table.iloc[-1], room.Results(tmp_path / "hall")
    cells = results.cells("simclr", "classification:class", 24) - results.cells("spark", "classification:class", 24)
    assert cells.shape == (11, 30) and last.difference == pytest.approx(cells.mean()) and last.low < .06 < last.high
    text = "".join(str(a.text) for a in room.room_figure(table).layout.annotations)
    assert "better" in text and "11 seeds" in room.room_words(table)


def test_watching_takes_over_what_comes_and_stops_when_asked(tmp_path, monkeypatch):
    laptop(tmp_path / "in", 0)
    naps = iter([lambda: laptop(tmp_path / "in", 1), lambda: None])

    def sleep(seconds):
        assert seconds == 5
        try: next(naps)()
        except StopIteration: raise KeyboardInterrupt from None
    monkeypatch.setattr(cli.time, "sleep", sleep)
    found = call("classroom", "collect", tmp_path / "in", "--out", tmp_path / "hall", "--watch", 5)
    assert found.exit_code == 130 and found.stdout.count("seeds: ") == 2 and "seeds: 0, 1" in found.stdout
    assert 'http-equiv="refresh" content="5"' in (tmp_path / "hall" / "room.html").read_text(encoding="utf-8")


# --- packages and rooms without internet ----------------------------------------------------------------------------------------------

def test_the_wheel_is_told_of_every_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "tasl_lab").rglob("__init__.py")}
    assert set(setup["packages"]) == inside | set(setup["package-dir"])
    assert all((ROOT / folder).is_dir() for folder in setup["package-dir"].values())


def test_nothing_needs_symbolic_links_and_windows_is_tried():
    links = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not re.search(r"^120000", links, re.M)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = " ".join(s.get("run", "") for s in jobs["windows"]["steps"])
    assert jobs["windows"]["runs-on"] == "windows-latest" and "tasl classroom rehearse" in steps and "make " not in steps


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The built wheel in a folder of its own, away from the clone."
    top = tmp_path_factory.mktemp("wheel")
    for name in ("tasl_lab", "nbs/experiments", "nbs/lessons", "data_samples", "pyproject.toml", "README.md", "LICENSE"):
        source, skip = ROOT / name, shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        if source.is_dir(): shutil.copytree(source, top / "clone" / name, ignore=skip)
        else: shutil.copy(source, top / "clone" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", top, top / "clone"], check=True, capture_output=True)
    shutil.rmtree(top / "clone")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", top / "site", next(top.glob("*.whl"))], check=True, capture_output=True)
    return top / "site"


def away(site, code, cwd):
    "Python on the installed wheel."
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installed_wheel_hands_out_and_runs_lesson_one(installed, tmp_path):
    (tmp_path / "plans.yaml").write_text('"1": {title: t, minutes: 10, parts: [{minutes: 10, lesson: 1, to: Where this fails, done: d}]}', encoding="utf-8")
    found = away(installed, "import json, tasl_lab\nfrom tasl_lab.batch.classroom import hand_out\nfrom tasl_lab.batch.lecture import rehearse\n"
                 "from tasl_lab.lab.lesson import records\n"
                 "print(json.dumps([tasl_lab.__file__, str(records()), list(hand_out('class')), rehearse('1', 'plans.yaml')]))", tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    library, recorded, laid, (row,) = json.loads(found.stdout)
    assert Path(library).parent.parent == installed and Path(recorded) == installed / "tasl_lab" / "recorded"
    assert row["ok"] and row["seconds"] > 0, row
    assert {p.name for p in (tmp_path / "class" / TOP / "lessons").iterdir()} == {p.name for p in LESSONS}
    assert sorted(p.name for p in Path(recorded).iterdir()) == sorted(p.name for p in (ROOT / "data_samples" / "runs").iterdir())
    assert any(n.endswith(".parquet") for n in laid)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="install.sh is for Linux and macOS; install.bat is tried by the Windows job")
def test_a_bundle_installs_from_its_folder_alone(tmp_path):
    project = tmp_path / "tiny"
    project.mkdir()
    (project / "tinytasl.py").write_text("ANSWER = 42\n")
    (project / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n\n'
                                            '[project]\nname = "tinytasl"\nversion = "0.3"\n\n[tool.setuptools]\npy-modules = ["tinytasl"]\n')
    lecture.bundle(tmp_path / "stick", project, ["--no-deps", "--no-build-isolation"])
    moved = (tmp_path / "stick").rename(tmp_path / "another place")
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", "install.sh"], cwd=moved, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = subprocess.run([moved / "tasl" / "bin" / "python", "-c", "import tinytasl; print(tinytasl.ANSWER)"], capture_output=True, text=True)
    assert found.stdout.strip() == "42"
    other = subprocess.run(["sh", "install.sh", tmp_path / "no"], cwd=moved, env=env | {"PYTHON": "sh"}, capture_output=True, text=True)
    assert other.returncode and not (tmp_path / "no").exists()


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="install.sh is for Linux and macOS")
def test_a_whole_bundle_runs_the_ninety_minutes_with_no_index(tmp_path):
    "Gigabytes and minutes: all wheels from the configured index, then an installation and the plan without any."
    made = call("classroom", "bundle", tmp_path / "stick", "--json")
    assert made.exit_code == 0, made.output
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    done = subprocess.run(["sh", "install.sh"], cwd=tmp_path / "stick", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tasl = tmp_path / "stick" / "tasl" / "bin" / "tasl"
    found = subprocess.run([tasl, "classroom", "rehearse", "90", "--json", "-q"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
