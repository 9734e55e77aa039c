"""Sweeps: which runs a file means, what is skipped, and what is left after a fault. Kernels, workers, schedulers and sweeping processes are killed here."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from tasl_lab import cli
from tasl_lab.batch import cluster, sweep
from tasl_lab.batch.runner import NotebookFailed, NotStarted, read_notebook
from tasl_lab.batch.sweep import Limits, Sweep, in_threads, outcome_of, plan, read_sweep, run_identity, run_one, run_sweep
from tasl_lab.core import InputError, read_json, rng, write_json


def notebook(path: Path, *cells: str) -> Path:
    "A notebook of code cells; the first carries the tag."
    made = [nbformat.v4.new_code_cell(c, id=f"c{i}") for i, c in enumerate(cells)]
    made[0].metadata["tags"] = ["parameters"]
    meta = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=meta), path)
    return path


# Leaves the id of its process and a line per start, sleeps, and leaves a result.
TINY = ("x: int = 0\nwait: float = 0.\nout: str = ''",
        "import json, os, time\nopen(f'{out}/starts', 'a').write(f'{os.getpid()}\\n')\ntime.sleep(wait)",
        "json.dump({'square': x * x}, open(f'{out}/results.json', 'w'))")


def tiny(folder, n=3, **more) -> Sweep:
    "A sweep over n numbers."
    return Sweep.of(notebook=str(notebook(folder / "tiny.ipynb", *TINY)), grid={"x": list(range(n))}, **more)


class Pretend:
    "An engine without kernels: the outcome of a run is what `says` makes of its parameters."
    def __init__(self, says=lambda p: "finished"): self.says, self.done = says, []

    def __call__(self, work, calls, limits, width):
        for name, call in calls.items():
            outcome = self.says(call["parameters"])
            if isinstance(outcome, BaseException): raise outcome
            self.done.append(call["parameters"].get("x"))
            error = {} if outcome == "finished" else {"error": f"x {self.done[-1]} failed"}
            if outcome != "unwritten": write_json(Path(call["folder"]) / "notebook.json", {"outcome": outcome, "seconds": 1.} | error)
            yield name, {"outcome": "finished" if outcome == "finished" else "failed"} | error


# --- the file -------------------------------------------------------------------------------------------------------------------------

WRONG = {"both": ({"grid": {"x": [1]}, "list": [{}]}, "grid and list: keep one"), "none": ({}, "none: add one"),
         "name": ({"grid": {"y": [1]}}, "'y' is unknown: it has x"), "type": ({"list": [{"x": 1}, {"x": 1.5}]}, "run 1 of tiny.ipynb: parameter 'x' = 1.5"),
         "twice": ({"list": [{"x": 1}, {"x": 1, "wait": 0}]}, r"run 1 \(wait=0, x=1\) is the same"), "empty": ({"grid": {"x": []}}, "no runs"),
         "folder": ({"grid": {"out": ["a"]}}, "which the sweep gives"), "range": ({"random": {"n": 2, "draw": {"x": {"low": 3, "high": 1}}}}, "x draws from"),
         "factors": ({"random": {"n": 2, "draw": {"wait": {"low": 0., "high": 1., "log": True}}}}, "low above 0"),
         "inputs": ({"grid": {"x": [1]}, "inputs": ["none.csv"]}, "none.csv does not exist")}


@pytest.mark.parametrize("case", WRONG)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(tmp_path, case):
    given, says = WRONG[case]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"notebook": notebook(tmp_path / "tiny.ipynb", *TINY).name} | given))
    engine = Pretend()
    with pytest.raises(InputError, match=says) as e: run_sweep(read_sweep(tmp_path / "sweep.yaml"), tmp_path / "out", engine)
    assert "\n" not in str(e.value) and not engine.done and not (tmp_path / "out").exists()


def test_a_grid_is_every_combination_and_common_parameters_hold_everywhere(tmp_path):
    (tmp_path / "s.yaml").write_text("notebook: tiny.ipynb\nparameters: {wait: 1e-3}\ngrid: {x: [1, 2]}\n")
    notebook(tmp_path / "tiny.ipynb", *TINY)
    assert [r.parameters for r in plan(read_sweep(tmp_path / "s.yaml"))] == [{"wait": .001, "x": 1}, {"wait": .001, "x": 2}]
    assert "scale_curve" in read_sweep(_write(tmp_path / "t.json", {"notebook": "scale_curve", "list": [{}]})).notebook


def _write(path, found): return write_json(path, found)


# --- identity -------------------------------------------------------------------------------------------------------------------------

def test_identity_is_code_parameters_and_inputs_and_nothing_else(tmp_path):
    nb = read_notebook(notebook(tmp_path / "a.ipynb", *TINY))
    base = run_identity(nb, {"x": 1})
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("Words."))
    nb.cells[2].outputs, nb.cells[2].execution_count = [nbformat.v4.new_output("stream", text="said")], 7
    assert run_identity(nb, {"x": 1, "wait": 0}) == run_identity(nb, {"x": 1, "wait": 0., "out": "elsewhere"}) == base
    nb.cells[3].source += "\n1 + 1"
    assert len({base, run_identity(nb, {"x": 1}), run_identity(nb, {"x": 2}), run_identity(nb, {"x": 1}, [("", "hash")])}) == 4
    changed = read_notebook(notebook(tmp_path / "b.ipynb", TINY[0].replace("wait: float = 0.", "wait: float = 1."), *TINY[1:]))
    assert run_identity(changed, {"x": 1}) != base and run_identity(changed, {"x": 1, "wait": 0.}) == base
    computed = [read_notebook(notebook(tmp_path / "c.ipynb", TINY[0] + f"\nn = {e}", *TINY[1:])) for e in ("max(1, 2)", "max(1, 3)")]
    assert run_identity(computed[0], {}) != run_identity(computed[1], {}), "a default that is computed counts as code"


def test_changed_inputs_are_another_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("1")
    made = lambda: {r.id for r in plan(tiny(tmp_path, inputs=[str(tmp_path / "data")]))}
    first = made()
    assert made() == first
    (tmp_path / "data" / "a.csv").write_text("2")
    assert not made() & first


# --- what is skipped, listed, resumed -------------------------------------------------------------------------------------------------

def test_finished_runs_are_skipped_and_failed_ones_wait_for_retry(tmp_path):
    engine = Pretend(lambda p: "failed" if p["x"] == 1 else "finished")
    found = run_sweep(tiny(tmp_path), tmp_path / "out", engine)
    assert engine.done == [0, 1, 2] and (found["finished"], found["failed"], found["skipped"]) == (2, 1, 0)
    again = run_sweep(tiny(tmp_path, 5), tmp_path / "out", engine)
    assert engine.done[3:] == [3, 4] and (again["finished"], again["failed"], again["skipped"]) == (4, 1, 3)
    assert [f["error"] for f in again["failures"]] == ["x 1 failed"] and "x 1 failed" in Path(again["page"]).read_text()
    healed = Pretend()
    assert run_sweep(tiny(tmp_path, 5), tmp_path / "out", healed, retry=True)["finished"] == 5 and healed.done == [1]


def test_the_table_holds_what_an_interrupted_sweep_has_done(tmp_path):
    engine = Pretend(lambda p: KeyboardInterrupt() if p["x"] == 2 else "finished")
    with pytest.raises(KeyboardInterrupt): run_sweep(tiny(tmp_path, 4), tmp_path / "out", engine)
    table = pd.read_parquet(tmp_path / "out" / "sweep.parquet")
    assert table.status.tolist() == ["finished", "finished", "left", "left"] and (tmp_path / "out" / "index.html").is_file()
    rest = Pretend()
    assert run_sweep(tiny(tmp_path, 4), tmp_path / "out", rest)["finished"] == 4 and rest.done == [2, 3]


def test_a_record_that_was_cut_or_never_written_is_no_finished_run(tmp_path):
    engine = Pretend(lambda p: "unwritten" if p["x"] == 0 else "finished")
    found = run_sweep(tiny(tmp_path), tmp_path / "out", engine)
    assert found["failures"][0]["error"] == "x 0 failed", "a disk that is full cannot hold the reason"
    folder = tmp_path / "out" / f"run-{plan(tiny(tmp_path))[1].id}"
    (folder / "notebook.json").write_text('{"outcome": "fini')
    again = Pretend()
    assert run_sweep(tiny(tmp_path), tmp_path / "out", again)["finished"] == 3 and again.done == [0, 1]


def test_results_become_columns_and_no_parameter_is_lost(tmp_path):
    path = notebook(tmp_path / "tiny.ipynb", TINY[0] + "\nkind: 'int|str' = 1\nseconds: int = 5", *TINY[1:])
    s = Sweep.of(notebook=str(path), parameters={"seconds": 7}, list=[{"x": 1, "kind": 2}, {"x": 2, "kind": "b"}])
    ids = [r.id for r in plan(s)]
    for k, i in enumerate(ids):
        write_json(tmp_path / "out" / f"run-{i}" / "results.json", {"x": k + 1, "kind": 9, "score": {"dice": k / 2, "name": "no number"}})
    found = run_sweep(s, tmp_path / "out", Pretend())
    table = pd.read_parquet(found["table"])
    assert table.columns[:3].tolist() == ["parameter.seconds", "x", "kind"] and table.kind.tolist() == ["2", '"b"']
    assert table.seconds.tolist() == [1, 1] and table["parameter.seconds"].tolist() == [7, 7], "a parameter called as a column of the table's own"
    assert table["score.dice"].tolist() == [0, .5] and table["result.kind"].tolist() == [9, 9] and "result.x" not in table and "score.name" not in table
    assert table.id.tolist() == ids == [r["id"] for r in read_json(tmp_path / "out" / "sweep.json")["runs"]]


def test_what_a_stranger_wrote_is_escaped_on_the_page(tmp_path):
    s = Sweep.of(notebook=str(notebook(tmp_path / "tiny.ipynb", TINY[0] + "\nname: str = ''", *TINY[1:])), list=[{"name": "<script>alert(1)</script>"}])
    found = run_sweep(s, tmp_path / "out", Pretend(lambda p: "failed"))
    page = Path(found["page"]).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "http:" not in page and "https:" not in page


# --- one run --------------------------------------------------------------------------------------------------------------------------

def _call(folder, limits=None): return {"id": "a", "notebook": "tiny.ipynb", "parameters": {}, "folder": str(folder), "cwd": ".",
                                        "limits": (limits or Limits()).model_dump()}


def test_a_run_is_computed_once_even_when_two_ask_for_it_at_the_same_time(tmp_path, monkeypatch):
    done = []

    def pretend(nb, parameters, folder, **kw):
        done.append(time.sleep(.2))
        write_json(Path(folder) / "notebook.json", {"outcome": "finished"})
    monkeypatch.setattr(sweep, "run_notebook", pretend)
    assert [f for _, f in in_threads(run_one, {k: _call(tmp_path / "run") for k in "abc"}, Limits(), 3)] == [{"outcome": "finished"}] * 3
    assert len(done) == 1


@pytest.mark.parametrize("error, tries", [(NotStarted, 3), (NotebookFailed, 1)])
def test_a_kernel_that_does_not_start_is_tried_again_and_a_failed_cell_is_not(tmp_path, monkeypatch, error, tries):
    tried = []

    def pretend(*args, **kw):
        tried.append(1)
        raise error("why\nit is so", tmp_path)
    monkeypatch.setattr(sweep, "run_notebook", pretend)
    assert run_one(_call(tmp_path / "run")) == {"outcome": "failed", "error": "why it is so"} and len(tried) == tries


def test_whoever_stops_listening_ends_the_runs(tmp_path):
    "They are stopped, not failed: the next call takes them up."
    found = in_threads(run_one, {"a": _call(tmp_path / "none") | {"notebook": str(tmp_path / "none.ipynb")},
                                 "b": _call(tmp_path / "b") | {"notebook": str(notebook(tmp_path / "tiny.ipynb", *TINY)),
                                                              "parameters": {"wait": 600., "out": str(tmp_path / "b")}}}, Limits(), 2)
    name, first = next(found)
    assert name == "a" and "no such notebook" in first["error"]
    until(lambda: (tmp_path / "b" / "starts").is_file() and (tmp_path / "b" / "starts").read_text())
    found.close()
    assert outcome_of(tmp_path / "b")["outcome"] == "stopped" and not alive(int((tmp_path / "b" / "starts").read_text()))


# --- the command ----------------------------------------------------------------------------------------------------------------------

def test_the_command_tells_failures_in_one_line_each_and_in_its_exit_code(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text("notebook: tiny.ipynb\ngrid: {x: [0, 1, 2]}\n")
    notebook(tmp_path / "tiny.ipynb", *TINY)
    monkeypatch.setattr(cluster, "on_cluster", lambda where: Pretend(lambda p: "failed" if p["x"] == 1 else "finished"))
    ask = lambda *more: CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), *more])
    first = ask("--json")
    assert first.exit_code == 1 and json.loads(first.stdout)["failures"][0]["label"] == "x=1"
    assert [line for line in first.stderr.splitlines() if "failed: x=1" in line] == ["failed: x=1: x 1 failed"]
    second = ask("--quiet")
    assert second.exit_code == 1 and not second.stderr and "--retry-failed" in second.stdout and "3 were there before" in second.stdout
    monkeypatch.setattr(cluster, "on_cluster", lambda where: Pretend())
    assert ask("--retry-failed").exit_code == 0
    (tmp_path / "s.yaml").write_text("notebook: [")
    refused = ask()
    assert refused.exit_code == 2 and refused.stderr.startswith("error: ") and len(refused.stderr.strip().splitlines()) == 1


def test_a_slurm_job_asks_for_what_one_run_needs(monkeypatch):
    jobqueue = pytest.importorskip("dask_jobqueue", reason="the extra 'slurm' is not installed")
    monkeypatch.setattr(jobqueue.SLURMCluster, "scale", lambda self, jobs: setattr(self, "asked", jobs))
    made = cluster._slurm(Limits(threads=4, memory="6 GB", gpus=1), 5)
    try:
        script = made.job_script()
        assert made.asked == 5 and "--cpus-per-task=4" in script and "--gres=gpu:1" in script and "--nthreads 4" in script and "gpu=1" in script
        assert "--mem=6G" in script
    finally: made.close()


# --- real ones ------------------------------------------------------------------------------------------------------------------------

def until(true, seconds=60):
    "Wait until `true()`."
    end = time.monotonic() + seconds * float(os.environ.get("TASL_PATIENCE", "1"))
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.05)


def alive(pid: int) -> bool:
    "Is there such a process, other than as a zombie?"
    try: return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


class Nodes:
    "A scheduler and two workers without nannies, each in a folder of its own, on the loopback."
    def __init__(self, folder, threads):
        self.folder, self.threads, self.workers = folder, threads, []
        folder.mkdir()
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", "scheduler.json", "--no-dashboard", "--no-show")
        until(lambda: (folder / "scheduler" / "scheduler.json").is_file())
        self.address = read_json(folder / "scheduler" / "scheduler.json")["address"]
        self.workers = [self.worker(f"node-{k}") for k in range(2)]

    def worker(self, name):
        return self._start(name, self.address, "--nthreads", str(self.threads), "--no-nanny", "--no-dashboard", "--local-directory", ".",
                           "--memory-limit", "0", "--death-timeout", "60", program="worker")

    def _start(self, name, *args, program="scheduler"):
        (self.folder / name).mkdir(exist_ok=True)
        with open(self.folder / name / "log.txt", "w") as log:
            return subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{program}", *args], cwd=self.folder / name, stdout=log, stderr=log)

    def __enter__(self): return self

    def __exit__(self, *exc):
        for p in (*self.workers, self.scheduler): p.kill()
        for p in (*self.workers, self.scheduler): p.wait()


def pids(out): return [int(line) for p in out.glob("run-*/starts") for line in p.read_text().split()]
def finished(out): return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("run-*/notebook.json") if outcome_of(p.parent)["outcome"] == "finished"}


def complete(found, out, n):
    "All runs of a tiny sweep are there with their results."
    assert (found["finished"], found["failed"], found["left"]) == (n, 0, 0), found
    table = pd.read_parquet(found["table"])
    assert (table.square == table.x ** 2).all() and table.x.tolist() == list(range(n)) and len(finished(out)) == n


def kill_unfinished(starts: Path) -> bool:
    "Kill the kernel that left this file if its notebook has no result yet: it is stopped first, so that none comes between the look and the blow."
    pid = next((int(line) for line in starts.read_text().split()), None)
    if pid is None or not alive(pid): return False
    os.kill(pid, signal.SIGSTOP)
    unfinished = not (starts.parent / "results.json").exists()
    os.kill(pid, signal.SIGKILL if unfinished else signal.SIGCONT)
    return unfinished


def once(out, before):
    "What was finished before a fault was not touched after it."
    now = finished(out)
    assert before and all(now[k] == v and len((out / k / "starts").read_text().split()) == 1 for k, v in before.items())


@pytest.mark.slow
def test_144_notebooks_24_wide_on_this_machine(tmp_path):
    told = []
    found = run_sweep(tiny(tmp_path, 144), tmp_path / "out", cluster.on_cluster("local"), width=24, progress=told.append)
    complete(found, tmp_path / "out", 144)
    assert len(pids(tmp_path / "out")) == len(told) == 144 and told[-1].finished == 144 and told[-1].left == 0


@pytest.mark.full
def test_144_notebooks_on_two_nodes(tmp_path):
    with Nodes(tmp_path / "nodes", threads=12) as nodes:
        found = run_sweep(tiny(tmp_path, 144), tmp_path / "out", cluster.on_cluster(nodes.address))
        complete(found, tmp_path / "out", 144)
        assert len(pids(tmp_path / "out")) == 144


# --- faults ---------------------------------------------------------------------------------------------------------------------------

N = 6


def command(folder, out, *more):
    "The sweep of N tiny notebooks as a program of its own."
    s = tiny(folder, N, parameters={"wait": .3})
    (folder / "s.yaml").write_text(yaml.safe_dump({"notebook": s.notebook, "parameters": s.parameters, "grid": s.grid}))
    program = [sys.executable, "-c", "from tasl_lab.cli import app; app()", "sweep", str(folder / "s.yaml"), "--out", str(out), "--json", "--quiet"]
    with open(folder / "said.txt", "a") as said: return subprocess.Popen([*program, *more], stdout=subprocess.PIPE, stderr=said, text=True)


def strike(name, out, process):
    "Wait for a moment in the middle of a sweep, random but the same every time; what is finished then."
    r = rng("fault", name)
    until(lambda: len(finished(out)) >= int(r.integers(1, N // 2 + 1)) or process.poll() is not None, 120)
    time.sleep(r.uniform(0, .3))
    assert process.poll() is None, "the sweep ended before the fault"
    return finished(out)


def said(folder): return (folder / "said.txt").read_text().strip().splitlines()


@pytest.mark.slow
def test_a_killed_kernel_fails_its_run_alone(tmp_path):
    out = tmp_path / "out"
    process = command(tmp_path, out, "--width", "2")
    before = strike("kernel", out, process)
    until(lambda: any(kill_unfinished(f) for f in out.glob("run-*/starts")) or process.poll() is not None)
    answer = json.loads(process.communicate(timeout=300)[0])
    assert process.returncode == 1 and answer["failed"] == 1 and answer["finished"] == N - 1
    assert "the kernel ended" in answer["failures"][0]["error"] and "\n" not in answer["failures"][0]["error"]
    complete(run_sweep(read_sweep(tmp_path / "s.yaml"), out, retry=True), out, N)
    once(out, before)


@pytest.mark.slow
def test_a_killed_worker_costs_no_run(tmp_path):
    "Its runs go to the other one, without another call."
    out = tmp_path / "out"
    with Nodes(tmp_path / "nodes", threads=1) as nodes:
        process = command(tmp_path, out, "--cluster", nodes.address)
        before = strike("worker", out, process)
        nodes.workers[0].kill()
        complete(json.loads(process.communicate(timeout=300)[0]), out, N)
        assert process.returncode == 0 and nodes.workers[1].poll() is None
        once(out, before)


@pytest.mark.slow
def test_a_killed_scheduler_is_told_in_one_line_and_the_next_call_goes_on(tmp_path):
    out = tmp_path / "out"
    with Nodes(tmp_path / "nodes", threads=1) as nodes:
        process = command(tmp_path, out, "--cluster", nodes.address)
        before = strike("scheduler", out, process)
        nodes.scheduler.kill()
        process.communicate(timeout=300)
        assert process.returncode == 1 and len(said(tmp_path)) == 1 and "the scheduler is gone" in said(tmp_path)[0], said(tmp_path)
        assert pd.read_parquet(out / "sweep.parquet").status.isin(["finished", "left"]).all()
    complete(run_sweep(read_sweep(tmp_path / "s.yaml"), out), out, N)
    once(out, before)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "elsewhere"])
def test_a_killed_sweep_leaves_no_process_and_the_next_call_goes_on(tmp_path, where):
    "Elsewhere the workers may still be at it when the next call comes."
    out = tmp_path / "out"
    with Nodes(tmp_path / "nodes", threads=1) if where == "elsewhere" else threading.Lock() as nodes:
        more = ["--cluster", nodes.address] if where == "elsewhere" else ["--width", "2"]
        process = command(tmp_path, out, *more)
        children = []
        before = strike(where, out, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        if where == "local": until(lambda: not any(alive(p) for p in [*pids(out), *(c.pid for c in children)]), 20)
        engine = cluster.on_cluster(nodes.address) if where == "elsewhere" else in_threads
        complete(run_sweep(read_sweep(tmp_path / "s.yaml"), out, engine), out, N)
        once(out, before)


HOW = ("how: str = 'well'\nout: str = ''", "import resource, time", "if how == 'sleeps': time.sleep(600)",
       "while how == 'prints': print('and on and on ' * 100)", "if how == 'eats': hoard = [b'x' * 10_000_000 for _ in range(10_000) if not time.sleep(.02)]",
       "if how == 'fills':\n    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n    open(f'{out}/big', 'wb').write(bytes(200_000))",
       "if how == 'says': print('x' * 400_000)")
SAYS = {"sleeps": "it took longer than the", "prints": "it printed more than the 1 MB", "eats": "it held more memory than the 400 MB",
        "fills": "File too large"}


@pytest.mark.slow
def test_a_notebook_that_goes_wild_is_ended_and_the_others_are_not(tmp_path):
    limits = {"memory": "400 MB", "seconds": 12 * float(os.environ.get("TASL_PATIENCE", "1")), "output": "1 MB"}
    s = Sweep.of(notebook=str(notebook(tmp_path / "wild.ipynb", *HOW)), grid={"how": [*SAYS, "well"]}, resources=limits)
    found = run_sweep(s, tmp_path / "out", cluster.on_cluster("local"), width=5)
    assert found["finished"] == 1 and found["failed"] == len(SAYS), found
    for f in found["failures"]:
        how = f["label"].removeprefix("how=")
        assert SAYS[how] in f["error"] and "\n" not in f["error"] and len(f["error"]) < 500
        assert outcome_of(tmp_path / "out" / f"run-{f['id']}")["error"] == f["error"]
    assert all(p.stat().st_size < 2.1e6 for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_disk_that_is_full_fails_the_runs_that_need_it_and_they_complete_later(tmp_path):
    "No file may exceed 100 kB, for the sweep itself as for its kernels: 400 kB of text fit neither log nor notebook."
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
            "from tasl_lab.batch.sweep import read_sweep, run_sweep\nimport json\n"
            "print(json.dumps(run_sweep(read_sweep(sys.argv[1]), sys.argv[2], width=2)))")
    notebook(tmp_path / "wild.ipynb", *HOW)
    (tmp_path / "s.yaml").write_text("notebook: wild.ipynb\ngrid: {how: [well, says]}\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s.yaml", tmp_path / "out"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (found["finished"], found["failed"]) == (1, 1) and "File too large" in found["failures"][0]["error"], found
    before = finished(tmp_path / "out")
    assert run_sweep(read_sweep(tmp_path / "s.yaml"), tmp_path / "out", retry=True)["finished"] == 2
    assert {k: v for k, v in finished(tmp_path / "out").items() if k in before} == before


# --- the cluster as `execute` ---------------------------------------------------------------------------------------------------------

def work(how, item, folder):
    "An item for `execute`; `die` takes its worker along the first time."
    if item == "die" and not (folder / "tried").exists():
        folder.mkdir(parents=True)
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "fail": raise ValueError("this one fails")
    write_json(folder / "run.json", {"item": item, "how": how, "process": os.getpid()})


@pytest.mark.slow
def test_the_cluster_is_an_execute_and_survives_a_worker(tmp_path):
    from functools import partial
    sys.modules["test_sweep"] = sys.modules[__name__]
    execute, told = cluster.executor("local"), []
    folders = execute({"a": 1, "b": "die", "c": 3}, tmp_path, partial(work, "well"), progress=lambda *a: told.append(a), workers=2)
    assert [read_json(f / "run.json")["item"] for f in folders.values()] == [1, "die", 3] and sorted(t[1] for t in told) == [1, 2, 3]
    with pytest.raises(ValueError, match="this one fails"): execute({"a": 1, "d": "fail"}, tmp_path, partial(work, "well"))
    assert read_json(tmp_path / "a" / "run.json")["how"] == "well"


@pytest.fixture
def one_node():
    "A cluster of one worker in this process, so that nothing has to be loaded anew; spoken to over TCP, as any other."
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None, memory_limit=0) as made:
        yield made


def told(command, out, *more):
    "What a command says as JSON, without times and places."
    def plain(x):
        if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if "seconds" not in k and k not in ("out", "tables")}
        return [plain(v) for v in x if not (isinstance(v, dict) and v.get("cost") == "seconds")] if isinstance(x, list) else x
    result = CliRunner().invoke(cli.app, [*command, "--quiet", "--json", "--out", str(out), *more])
    assert result.exit_code == 0, result.output
    return plain(json.loads(result.stdout))


SMALL = {"pictures": 120, "size": 32,
         "matrix": {"objectives": ["simclr"], "tasks": ["classification:class"], "labels": [24], "seeds": 2, "draws": 2, "steps": 3, "batch": 16,
                    "finetune_steps": 2, "ceiling": False, "again": False}}
COMMANDS = {"gate": ["gate", "--size", "32", "--pictures", "120", "--steps", "4", "--batch", "16", "--labels", "24", "--seeds", "2",
                     "--objectives", "simclr", "--validation"],
            "matrix": ["matrix", "--preset", "smoke"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_gate_and_matrix_say_the_same_on_a_cluster(name, tmp_path, monkeypatch, one_node):
    from tasl_lab.alignment import gate, matrix
    tuned, short = gate._tuned, {"finetune_steps": 2}
    monkeypatch.setitem(matrix.PRESETS, "smoke", SMALL)
    monkeypatch.setattr(gate, "_tuned", lambda encoder, data, config, *rest: tuned(encoder, data, config.model_copy(update=short), *rest))
    here = told(COMMANDS[name], tmp_path / "here", "--width", "1")
    monkeypatch.setattr("tasl_lab.training.execute", None)
    there = told(COMMANDS[name], tmp_path / "there", "--cluster", one_node.scheduler_address)
    assert here == there
    items = {p.parent.name for p in (tmp_path / "there").rglob("gate.json" if name == "gate" else "item.json")}
    ran = {str(t[0]).rpartition("-")[0] for t in one_node.scheduler.transition_log}
    assert len(items) >= 4 and items <= ran, "every piece of work went over the scheduler"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_names_no_cluster_is_refused_before_any_work(name, tmp_path):
    result = CliRunner().invoke(cli.app, [*COMMANDS[name], "--cluster", "moon", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.startswith("error: cluster 'moon' is unknown: use local, slurm, or the address")
    assert not (tmp_path / "out").exists()
