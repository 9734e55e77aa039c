"""Notebooks as programs: what is refused before a kernel starts, and what is left and said when a cell fails."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from tasl_lab.batch.runner import NotebookFailed, parse_value, read_notebook, read_parameters, run_notebook, template
from tasl_lab.core import InputError

HINTS = """steps: int = 10
rate: float = .1
name: str = 'a'
fast: bool = False
data: list[str] = ['x']
sizes: list[int] = []
limit: 'float|None' = None"""


def notebook(path: Path, *cells: str, tag: str = "parameters", language: str = "python") -> Path:
    "A notebook of code cells; the first carries the tag."
    made = [nbformat.v4.new_code_cell(c) for c in cells]
    made[0].metadata["tags"] = [tag] if tag else []
    meta = {"kernelspec": {"name": "python3", "language": language, "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=meta), path)
    return path


@pytest.fixture
def hinted(tmp_path) -> Path:
    return notebook(tmp_path / "hinted.ipynb", HINTS, "print('ran')")


def refused(path, values, tmp_path, **kw) -> str:
    "The sentence with which the runner refuses; nothing was run."
    with pytest.raises(InputError) as e: run_notebook(path, values, tmp_path / "out", **kw)
    assert "\n" not in str(e.value) and not (tmp_path / "out" / "log.txt").exists()
    return str(e.value)


# --- refused before anything runs ------------------------------------------------------------------------------------------------------

def test_a_notebook_without_parameters_cell_is_refused(tmp_path):
    assert "no cell is tagged 'parameters'" in refused(notebook(tmp_path / "a.ipynb", "x = 1", tag=""), {}, tmp_path)
    only = notebook(tmp_path / "b.ipynb", "#| eval: false\nx = 1", "y = 1")
    assert "no cell is tagged" in refused(only, {}, tmp_path), "a cell that will not be run cannot set parameters"


def test_what_is_no_python_notebook_is_refused(tmp_path):
    assert "no such notebook" in refused(tmp_path / "none.ipynb", {}, tmp_path)
    (tmp_path / "text.ipynb").write_text("not json")
    assert "not a notebook" in refused(tmp_path / "text.ipynb", {}, tmp_path)
    assert "written in R" in refused(notebook(tmp_path / "r.ipynb", "x <- 1", language="R"), {}, tmp_path)
    assert "not valid Python" in refused(notebook(tmp_path / "broken.ipynb", "x ="), {}, tmp_path)


def test_an_unknown_parameter_is_refused_and_the_known_ones_are_named(hinted, tmp_path):
    said = refused(hinted, {"step": 3}, tmp_path)
    assert "hinted.ipynb: parameter 'step' is unknown" in said and "steps (int)" in said


ILL = [{"steps": "10"}, {"steps": 1.5}, {"steps": True}, {"rate": "fast"}, {"name": 1}, {"name": None}, {"name": Path("x")}, {"fast": 1},
       {"data": "x"}, {"data": ["x", 1]}, {"sizes": ["1"]}, {"limit": "high"}]


@pytest.mark.parametrize("values", ILL, ids=str)
def test_an_ill_typed_parameter_is_refused(hinted, tmp_path, values):
    [(name, value)] = values.items()
    assert f"parameter '{name}' = {value!r} does not fit its type" in refused(hinted, values, tmp_path)


def test_a_hint_that_names_no_plain_type_is_refused_without_running_it(tmp_path):
    for i, hint in enumerate(("Path", "__import__('os').system('touch ' + 'trap')", "(1).__class__")):
        assert "has the hint" in refused(notebook(tmp_path / f"{i}.ipynb", f"x: {hint} = None"), {}, tmp_path)
    assert not Path("trap").exists()


def test_the_configuration_schema_is_asked(tmp_path):
    from tasl_lab.config import PretrainConfig
    path = notebook(tmp_path / "a.ipynb", "steps: int = 3\nout: str = ''")
    assert "steps = 0" in refused(path, {"steps": 0, "out": "x"}, tmp_path, schema=PretrainConfig)


def test_neither_the_notebook_nor_a_file_is_overwritten(hinted, tmp_path):
    before = hinted.read_bytes()
    with pytest.raises(InputError, match="folder of the notebook itself"): run_notebook(hinted, {}, tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"): run_notebook(hinted, {}, tmp_path / "out")
    assert hinted.read_bytes() == before and (tmp_path / "out").read_text() == "mine"


# --- texts ----------------------------------------------------------------------------------------------------------------------------

TEXTS = [("steps", "12", 12), ("rate", "1e-3", 1e-3), ("rate", "2", 2.), ("name", "3", "3"), ("fast", "true", True), ("fast", "no", False),
         ("data", "brain,phantom", ["brain", "phantom"]), ("data", '["a,b"]', ["a,b"]), ("sizes", "32,64", [32, 64]),
         ("limit", "null", None), ("limit", "0.5", .5)]


@pytest.mark.parametrize("name, text, value", TEXTS)
def test_texts_become_values(hinted, name, text, value):
    got = parse_value(text, read_parameters(hinted)[name])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name, text", [("steps", "many"), ("steps", "1.5"), ("fast", "perhaps"), ("sizes", "a,b")])
def test_texts_that_are_no_value_are_refused(hinted, name, text):
    with pytest.raises(InputError, match=f"parameter '{name}' = '{text}'"): parse_value(text, read_parameters(hinted)[name])


# --- runs -----------------------------------------------------------------------------------------------------------------------------

def test_a_run_leaves_notebook_log_and_record(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "steps: int = 1\nout: str = ''", "#| eval: false\nraise RuntimeError",
                    "#| hide\nimport os, sys\nprint('step', steps)\nprint('warned', file=sys.stderr)",
                    "open(out, 'w').write(f'{os.getcwd()}\\n{sys.executable}')")
    assert len(read_notebook(path).cells) == 3
    heard, out = [], tmp_path / "run"
    done = run_notebook(path, {"steps": 7, "out": str(tmp_path / "result")}, out, show=heard.append)
    assert done == out / "a.ipynb" and "".join(heard) == "step 7\n"
    log = (out / "log.txt").read_text()
    assert "step 7" in log and "warned" in log and '"steps": 7' in log
    record = json.loads((out / "notebook.json").read_text())
    assert record["outcome"] == "finished" and record["parameters"]["steps"] == 7 and record["notebook"] == "a.ipynb"
    assert not {"input_path", "output_path"} & set(read_notebook(done).metadata.papermill)
    assert (tmp_path / "result").read_text().split("\n") == [os.getcwd(), sys.executable]


def test_a_kernel_of_another_python_is_not_taken(tmp_path, monkeypatch):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    other = {"argv": ["/no/such/python", "-m", "x", "{connection_file}"], "display_name": "other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    path, heard = notebook(tmp_path / "a.ipynb", "x: int = 1", "import sys\nprint(sys.executable)"), []
    run_notebook(path, {}, tmp_path / "run", show=heard.append)
    assert "".join(heard).strip() == sys.executable


FAILS = ("how: str = ''", "print('so far')", "import os\nfrom tasl_lab.core import InputError",
         "if how == 'refuse': raise InputError('mask 3: shape (4, 4), picture (8, 8): give one size')",
         "if how == 'die': os.kill(os.getpid(), 9)", "1 / 0")
SAID = {"": (NotebookFailed, r"a.ipynb: cell \[7\] raised ZeroDivisionError: division by zero; what ran so far is in .*run.a.ipynb"),
        "refuse": (InputError, r"^mask 3: shape \(4, 4\), picture \(8, 8\): give one size$"),
        "die": (NotebookFailed, "a.ipynb: the kernel ended")}


@pytest.mark.parametrize("how", SAID)
def test_a_failure_is_one_line_and_the_partial_notebook_stays(tmp_path, how):
    error, said = SAID[how]
    path = notebook(tmp_path / "a.ipynb", *FAILS)
    with pytest.raises(error, match=said) as e: run_notebook(path, {"how": how}, tmp_path / "run")
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)
    partial = nbformat.read(tmp_path / "run" / "a.ipynb", as_version=4)
    assert "so far\n" in [o.text for c in partial.cells for o in c.get("outputs", []) if o.output_type == "stream"]
    log, record = (tmp_path / "run" / "log.txt").read_text(), json.loads((tmp_path / "run" / "notebook.json").read_text())
    assert "so far" in log and "\x1b" not in log and record["outcome"] == "failed" and record["error"] == str(e.value)
    if error is NotebookFailed: assert e.value.notebook == tmp_path / "run" / "a.ipynb"


@pytest.mark.skipif(os.name != "posix", reason="sends Unix signals")
def test_ctrl_c_ends_the_kernel_too(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "out: str = ''", "import os, time\nopen(out, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    command = [sys.executable, "-c", "from tasl_lab.cli import app; app()", "run", path, "-p", "out", tmp_path / "pid", "--out", tmp_path / "run"]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C, and its children with it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen)
    try:
        until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and said.strip().startswith("stopped") and len(said.strip().splitlines()) == 1, said
    until(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert json.loads((tmp_path / "run" / "notebook.json").read_text())["outcome"] == "stopped"


def until(true, seconds=30):
    "Wait until `true()`."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.05)


def alive(pid: int) -> bool:
    "Is there such a process, other than as a zombie?"
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


# --- templates ------------------------------------------------------------------------------------------------------------------------

def test_templates_are_found_in_a_clone_or_among_the_data_files(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not found in .*nbs.*share"): template("no-such-experiment")
    place = tmp_path / "share" / "tasl_lab" / "experiments"
    place.mkdir(parents=True)
    path = notebook(place / "only-installed.ipynb", "x: int = 1")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert template("only-installed") == path
    with pytest.raises(InputError, match="use one of .*only-installed"): template("no-such-experiment")
