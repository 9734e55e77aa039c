"""The Lab without a browser: runs that stop and go on, queues, failures, kernels that die, cells that are run again, papermill."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tasl_lab.config import PretrainConfig
from tasl_lab.data.phantom import phantom
from tasl_lab.lab.session import AT_REST, Cadence, Panel, Session, cell_id, told
from tasl_lab.training import pretrain


@pytest.fixture(scope="module")
def data(): return phantom(90, size=32, seed=0)


def config(objective="spark", **given): return PretrainConfig.of(**{"objective": objective, "steps": 10, "batch": 16, "precision": "fp32", "watch": 4} | given)


def until(condition, seconds=120.):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.005)


def halted(session, job, step):
    "Stop a run from another thread once it has done `step` steps."
    until(lambda: job.step >= step or job.status in AT_REST)
    t = threading.Thread(target=session.stop, args=(job,))
    t.start()
    t.join()
    assert session.wait(job, 60)


@pytest.mark.parametrize("objective", ["spark", "simclr+0.5*spark", "mocov3"])
def test_a_run_stopped_twice_ends_with_the_same_losses(data, tmp_path, objective):
    session, c = Session(data, tmp_path, "cpu", tasks=(), every=100), config(objective, options={"mocov3": {"queue": 64}} if objective == "mocov3" else {})
    job = session.submit(c)
    for step in (2, 5):
        halted(session, job, step)
        session.resume(job)
    assert session.wait(job, 120) and job.status == "finished", told(job)
    assert [r["step"] for r in job.rows] == list(range(1, 11)) and [r["loss"] for r in job.rows] == [s.loss for s in pretrain(c, data, device="cpu")]


def test_a_stop_in_the_last_step_comes_too_late_and_before_the_first_leaves_a_whole_run(data, tmp_path):
    session = Session(data, tmp_path, "cpu", tasks=())
    job = session.submit(config(steps=3))
    session.stop(job)
    assert session.wait(job, 60) and job.status == "stopped" and job.step <= 1
    last = threading.Event()
    end = session.listen(lambda s, j: last.set() if j.step == 3 else None)
    session.pause = 0.
    session.resume(job)
    last.wait(60)
    session.stop(job)
    assert session.wait(job, 60) and job.status == "finished" and (job.folder / "run.json").is_file()
    end()


def test_failures_are_said_and_the_queue_goes_on(data, tmp_path):
    session = Session(data, tmp_path, "cpu", tasks=())
    session.listen(lambda s, j: 1 / 0)
    jobs = [session.submit(c) for c in (config(lr=1e30, objective="simclr"), config(batch=4000), config(steps=2))]
    assert session.wait(timeout=120)
    assert [j.status for j in jobs] == ["failed", "failed", "finished"]
    assert "lower the learning rate" in jobs[0].message and "use a batch of at most" in jobs[1].message
    assert session.problems and "ZeroDivisionError" in session.problems[0]


def test_two_devices_have_a_queue_each_and_do_not_disturb_each_other(data, tmp_path):
    session, started = Session(data, tmp_path, tasks=()), []
    session.listen(lambda s, j: started.append(sum(k.status == "training" for k in s.jobs)))
    jobs = [session.submit(config(seed=s, steps=12), device) for s, device in ((1, "cpu"), (2, "cpu:0"), (3, "cpu"))]
    assert session.wait(timeout=240) and all(j.status == "finished" for j in jobs)
    assert max(started) <= 2 and not session.threads
    for j in jobs: assert [r["loss"] for r in j.rows] == [s.loss for s in pretrain(j.config, data, device="cpu")]


def test_a_checkpoint_is_due_at_marks_after_seconds_and_at_a_stop():
    stop = threading.Event()
    c = Cadence(5, stop, seconds=1e9)
    assert [k for k in range(1, 12) if k % c == 0] == [5, 10]
    stop.set()
    assert 11 % c == 0 and c.kept == 11


def test_a_panel_made_twice_in_one_request_stays_and_in_a_later_one_goes(data, tmp_path, monkeypatch):
    from tasl_lab.lab import session as module
    session, request = Session(data, tmp_path, tasks=()), {"header": {"msg_id": "a"}, "metadata": {"cellId": "cell"}}
    monkeypatch.setattr(module, "_parent", lambda: request)
    assert cell_id() == "cell"

    class Seen(Panel):
        closed = False
        def close(self): self.closed = True
    one, two = Seen(session), Seen(session)
    request["header"]["msg_id"] = "b"
    three = Seen(session)
    assert one.live and one.closed and two.closed and not three.closed and module.CELLS["cell"][1] == [three]
    module.CELLS.clear()


KILLED = """
import sys
from tasl_lab.config import PretrainConfig
from tasl_lab.data.phantom import phantom
from tasl_lab.lab.session import Session
s = Session(phantom(90, size=32, seed=0), sys.argv[1], "cpu", tasks=(), every=3)
job = s.submit(PretrainConfig.of(**__import__("json").loads(sys.argv[2])))
while True:
    if job.step >= 4: print("far enough", flush=True)
    s.wait(job, .05)
"""


def test_the_supervised_baseline_waits_stops_and_is_measured_once(data, tmp_path, monkeypatch):
    session = Session(data, tmp_path, "cpu", tasks=("classification:class",), labels=24, supervised=40)
    asked = []
    monkeypatch.setattr(Session, "_from_scratch", lambda self, job, task, real=Session._from_scratch: asked.append(task) or real(self, job, task))
    job = session.baseline()
    until(lambda: asked)
    session.stop(job)
    assert session.wait(job, 240) and job.status == "stopped" and "supervised" not in session.baselines, told(job)
    assert not (tmp_path / "supervised.json").exists(), "it was stopped on the way"
    session.resume(job)
    assert session.wait(job, 240) and job.status == "finished" and 0 < session.baselines["supervised"]["classification:class"] <= 1, told(job)
    later = Session(data, tmp_path, "cpu", tasks=("classification:class",), labels=24, supervised=40)
    assert later.wait(later.baseline(), 60) and later.baselines == session.baselines and len(asked) == 2, "kept in the folder, not measured again"


def test_one_rule_for_the_two_tasks(data):
    from tasl_lab.alignment.matrix import default_tasks
    from tasl_lab.lab.session import two_tasks
    assert list(two_tasks(data)) == default_tasks(data)[:2] == ["classification:class", "segmentation:tissue"]


@pytest.mark.slow
def test_a_killed_kernel_leaves_a_run_that_can_go_on(data, tmp_path):
    c = config(steps=400)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), c.model_dump_json()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "far enough" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert "External init callback" not in process.communicate()[1], "torch's profiler is not entered from the training thread"
    session = Session(data, tmp_path, "cpu", tasks=(), every=3)
    job, = session.jobs
    at = job.step
    assert job.status == "stopped" and at >= 3 and at % 3 == 0
    session.resume(job)
    halted(session, job, at + 4)
    assert job.step > at
    states = pretrain(c, data, device="cpu")
    assert [r["loss"] for r in job.rows] == [next(states).loss for _ in job.rows]


def execute(client, code, cell, timeout=240):
    "Run code as JupyterLab does, with the id of its cell; returns what it printed."
    message = client.session.msg("execute_request", {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False,
                                                     "stop_on_error": True}, metadata={"cellId": cell})
    client.shell_channel.send(message)
    text, end = "", time.monotonic() + timeout
    while time.monotonic() < end:
        m = client.get_iopub_msg(timeout=timeout)
        if m["parent_header"].get("msg_id") != message["header"]["msg_id"]: continue
        if m["msg_type"] == "stream": text += m["content"]["text"]
        if m["msg_type"] == "error": raise AssertionError("\n".join(m["content"]["traceback"]))
        if m["msg_type"] == "status" and m["content"]["execution_state"] == "idle": return text
    raise AssertionError(f"no answer in {timeout} s")


COUNT = """
import gc, json, threading, time
import psutil
from ipywidgets.widgets.widget import _instances
from tasl_lab.lab.session import CELLS
gc.collect()
own = lambda: sorted(t.name for t in threading.enumerate() if t.name.startswith("tasl"))
end = time.monotonic() + 20
while len(own()) > len(set(own())) and time.monotonic() < end: time.sleep(.1)  # the thread of a panel that was just closed is on its way out
print(json.dumps({"threads": own(), "widgets": len(_instances),
                  "processes": len(psutil.Process().children(recursive=True)),
                  "panels": sum(len(p) for _, p in CELLS.values()), "listeners": len(lab.session.listeners), "jobs": len(lab.session.jobs)}))
"""


IMPORTS = """
from tasl_lab.lab import Lab
from tasl_lab.config import PretrainConfig
from tasl_lab.data.phantom import phantom
data = phantom(90, size=32, seed=0)
"""
RESUMED = """
import json, time
job, = lab.session.jobs
status, before = job.status, job.step
lab.session.resume(job)
while job.step <= before and job.status != "failed": time.sleep(.05)
print(json.dumps({"status": status, "before": before, "after": job.step}))
"""


@pytest.mark.slow
def test_ten_reruns_of_a_cell_leave_one_panel_and_a_restarted_kernel_goes_on(tmp_path):
    from jupyter_client.manager import start_new_kernel
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    manager, client = start_new_kernel(kernel_name="python3", env={**os.environ, "PATH": path, "TASL_CACHE": str(tmp_path / "cache")})
    opened = (f"lab = Lab(data, PretrainConfig.of(objective='spark', steps=100000, batch=16), out={str(tmp_path / 'runs')!r}, tasks=(), live=None)\n"
              "for name in lab.names: lab.panel(name).show()\n")
    try:
        execute(client, IMPORTS, "first")
        execute(client, opened + "lab.panel('Train').go.click()\nlab.panel('Explore').map('UMAP')\nlab.panel('Choose').settle()", "cell")
        before = json.loads(execute(client, COUNT, "count"))
        for _ in range(10): execute(client, opened + "lab.panel('Explore').map('UMAP')\nlab.panel('Choose').settle()", "cell")
        after = json.loads(execute(client, COUNT, "count"))
        assert after == before and before["jobs"] == 1 and before["threads"] == ["tasl-lab cpu", "tasl-lab map"] and before["processes"] == 2, (before, after)
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=120)
        execute(client, IMPORTS, "first")
        told = json.loads(execute(client, opened + RESUMED, "cell"))
        assert told["status"] == "stopped" and told["after"] > told["before"] >= 25, told
        left = json.loads(execute(client, "explore = lab.panel('Explore')\nlab.session.close()\nlab.close()\nexplore.wait(20)\n" + COUNT, "end"))
        assert left["threads"] == [] and left["listeners"] == left["processes"] == 0
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_papermill_gives_a_small_notebook_with_pictures_and_no_widgets(root, tmp_path):
    import papermill
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(root / "nbs" / "lessons" / "00_lab.ipynb", out, {"size": 32, "pictures": 150, "steps": 4, "out": str(tmp_path / "runs")},
                               kernel_name="python3", cwd=tmp_path, progress_bar=False)
    nb = json.loads(out.read_text())
    shown = [o for c in nb["cells"] for o in c.get("outputs", [])]
    kinds = [k for o in shown for k in o.get("data", {})]
    assert out.stat().st_size < 1_000_000 and "widgets" not in nb["metadata"] and not any("widget" in k for k in kinds)
    assert kinds.count("image/png") >= 3 and "image/svg+xml" in kinds
    text = "".join("".join(o.get("text", "")) for o in shown)
    assert re.search(r"simclr on cnn-tiny, seed 0: finished, step 4 of 4", text) and "Probes (" in text
    print(f"{out.stat().st_size / 1000:.0f} kB")
