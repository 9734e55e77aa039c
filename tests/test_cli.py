"""The command line: start-up, results as JSON, and one clear line with the right exit code for whatever cannot be used."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import tasl_lab
from tasl_lab import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = ["pretrain", "--data", "phantom", "--size", "32", "--pictures", "60", "--encoder", "vit-tiny", "--steps", "3", "--batch", "8"]


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def python(code: str, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kw)


def refused(*args, says: str):
    "Exit code 2 and one line that contains `says`."
    result = call(*args)
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert line.startswith("error: ") and says in line and "\n" not in line and "Traceback" not in result.output, result.output


# --- start-up -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def half_a_second():
    "Seconds of a processor; where it is so slow, or so busy, that NumPy and Typer alone take a sixth of a second, three times what they take."
    code = "import time, numpy, typer; print(time.process_time())"
    return max(.5, 3 * min(float(python(code).stdout) for _ in range(3))) * float(os.environ.get("TASL_PATIENCE", "1"))


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["objectives", "--json"], ["data", "list"], ["pretrain", "--help"],
                                  ["preregister", "--help"],
                                  ["advise", "--task", "segmentation", "--modality", "mri", "--labels", "20", "--dims", "3"]], ids=" ".join)
def test_commands_that_need_no_torch_start_at_once(args, half_a_second):
    "Half a second of processor time, the best of three."
    code = ("import sys, time\nfrom tasl_lab.cli import app\n"
            f"try: app({args!r})\nexcept SystemExit as e: code = e.code\n"
            "heavy = [m for m in ('torch', 'monai', 'sklearn', 'scipy.special', 'plotly', 'papermill', 'pandas') if m in sys.modules]\n"
            "print(code or 0, time.process_time(), *heavy, file=sys.stderr)")
    best = None
    for _ in range(3):
        status, seconds, *heavy = python(code).stderr.split()
        assert status == "0" and not heavy
        best = min(float(seconds), best or 1e9)
        if best < half_a_second: break
    assert best < half_a_second


def test_importing_the_library_costs_next_to_nothing():
    "Less than .3 s of processor time over Python's own start; the best of three."
    code = "import time; start = time.process_time(); import tasl_lab; print(time.process_time() - start)"
    assert min(float(python(code).stdout) for _ in range(3)) < .3 * float(os.environ.get("TASL_PATIENCE", "1"))


def test_the_installed_program_runs():
    program = Path(sys.executable).parent / "tasl"
    if not program.exists(): pytest.skip("the package is not installed, so there is no program 'tasl'")
    found = subprocess.run([program, "objectives", "--json"], capture_output=True, text=True)
    assert found.returncode == 0 and json.loads(found.stdout)["objectives"]
    assert subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip() == f"tasl {tasl_lab.__version__}"


def test_every_command_has_help_with_a_sentence_and_json():
    found = call("--help").output
    for name in ("demo", "run", "pretrain", "profile", "objectives", "doctor", "lab", "matrix", "gate", "audit", "advise", "preregister"):
        assert f"\n  {name} " in found
        told = call(name, "--help").output
        assert "Examples:" in told and "--json" in told


# --- results --------------------------------------------------------------------------------------------------------------------------

def test_results_are_json():
    assert {"simclr", "mae", "spark"} <= {c["id"] for c in json.loads(call("objectives", "--json").stdout)["objectives"]}
    assert {"brain", "phantom", "phantom:ct"} <= {s["name"] for s in json.loads(call("data", "list", "--json").stdout)}
    assert json.loads(call("doctor", "--json").stdout)["device"]


def test_the_table_of_objectives_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = call("objectives").output
    assert "arXiv:2002.05709" in found and max(map(len, found.splitlines())) <= 100


def test_options_of_pretrain_are_those_of_its_schema():
    from tasl_lab.config import PretrainConfig
    told = call("pretrain", "--help").output
    for name in PretrainConfig.model_fields: assert f"--{name.replace('_', '-')} " in told


def test_pretrain_leaves_a_run_and_does_it_once(tmp_path):
    first = call(*TINY, "--out", tmp_path / "run", "--json")
    record, stamp = json.loads(first.stdout), (tmp_path / "run" / "run.json").stat().st_mtime_ns
    assert record["budget"]["steps"] == 3 and record["config"]["batch"] == 8
    assert {"encoder.safetensors", "metrics.parquet", "run.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert call(*TINY, "--out", tmp_path / "run").exit_code == 0 and (tmp_path / "run" / "run.json").stat().st_mtime_ns == stamp
    refused(*TINY, "--seed", 1, "--out", tmp_path / "run", says="holds another finished run")


def test_pretrain_tells_what_it_used(tmp_path):
    told = call(*TINY, "--out", tmp_path).stdout
    assert re.search(r"^\d+ pictures/s; .*forward \d+ %.*backward \d+ %.*; peak \d+ MB$", told, re.M)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["budget"]["resources"]  # as earlier versions wrote it
    (tmp_path / "run.json").write_text(json.dumps(record))
    again = call(*TINY, "--out", tmp_path)
    assert again.exit_code == 0 and "3 steps, 24 pictures seen" in again.stdout and "pictures/s" not in again.stdout


def test_profile_measures_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["profile", *TINY[1:7], "--objective", "mae", "--encoder", "vit-tiny", "--batch", 8, "--steps", 2]
    found = json.loads(call(*args, "--json").stdout)
    assert {"data", "views", "forward", "watch", "backward", "optimiser"} == set(found["milliseconds"]) == set(found["share"])
    assert sum(found["milliseconds"].values()) == pytest.approx(8000 / found["pictures_per_second"], rel=.01) and found["steps"] == 2
    own = [o["ms"] for o in found["operators"]]
    assert len(own) == 10 and own == sorted(own, reverse=True) and own[-1] > 0 and sum(o["share"] for o in found["operators"]) < 1
    assert {"operator", "calls", "ms", "share"} == set(found["operators"][0]) and any("addmm" in o["operator"] for o in found["operators"])
    text = call(*args).stdout
    assert "2 steps of 8 pictures on cpu" in text and "\nbackward " in text and "\nstep " in text and " pictures/s; " in text
    assert not list(tmp_path.iterdir())
    refused(*args[:-1], 0, says="steps = 0")


# --- the check-up ---------------------------------------------------------------------------------------------------------------------

def test_doctor_passes_the_cpu():
    from tasl_lab.core import pick_device, pick_precision
    half = pick_precision(device=pick_device("cpu")) == "bf16"
    result = call("doctor", "--device", "cpu", "--steps", 8)
    assert result.exit_code == 0, result.output
    lines, n = [line for line in result.stdout.splitlines() if line.startswith(("ok ", "FAILED "))], 15 if half else 12
    assert len(lines) == n and all(line.startswith("ok ") for line in lines) and f"{n} of {n} checks passed" in result.stdout
    found = lambda words: sum(words in line for line in lines)
    assert found("simclr on cnn-tiny: loss against the CPU's, 8 steps") == found("masked on vit-tiny: stopped after step 7") == 1
    assert found("byol on cnn-tiny: loss in bf16") == half


def forgets_the_optimiser(monkeypatch):
    from tasl_lab import training
    whole = training.load_checkpoint
    def load(run, path):
        fresh = run.optimizer.state_dict()
        done = whole(run, path)
        run.optimizer.load_state_dict(fresh)
        return done
    monkeypatch.setattr(training, "load_checkpoint", load)


def starts_anew(monkeypatch): monkeypatch.setattr("tasl_lab.training._resume", lambda run, out: (0, []))


def computes_coarsely(monkeypatch):
    import torch
    monkeypatch.setattr("tasl_lab.checkup._plain_fp32", lambda: torch.autocast("cpu", torch.bfloat16))


def breaks_in_bf16(monkeypatch):
    from tasl_lab import training
    wild = {"lr": 1e30, "clip": 1e30}
    monkeypatch.setattr("tasl_lab.checkup.pick_precision", lambda *args, **kw: "bf16")
    monkeypatch.setattr("tasl_lab.checkup.pretrain", lambda config, *args, **kw: training.pretrain(
        config.model_copy(update=wild if config.precision == "bf16" else {}), *args, **kw))


@pytest.mark.parametrize("plant, found", [
    (forgets_the_optimiser, ["stopped after step 7"]), (starts_anew, ["stopped after step 7"]),
    (computes_coarsely, ["loss against", "gradient norm against", "move of the weights against"]), (breaks_in_bf16, ["loss in bf16"])],
    ids=lambda p: getattr(p, "__name__", ""))
def test_doctor_finds_a_fault_and_names_it(monkeypatch, plant, found):
    monkeypatch.setattr("tasl_lab.checkup.PATIENTS", (("masked", "vit-tiny"),))
    plant(monkeypatch)
    result = call("doctor", "--device", "cpu", "--steps", 12, "--json")
    failed = [c["what"] for c in json.loads(result.stdout)["checks"] if not c["ok"]]
    assert result.exit_code == 1 and len(failed) == len(found) and all(f"masked on vit-tiny: {f}" in w for f, w in zip(found, failed))


def test_doctor_refuses_what_cannot_be_examined():
    refused("doctor", "--device", "cuda:99", says="device 'cuda:99' is not available, this machine has")
    refused("doctor", "--device", "abacus", says="use auto, cpu, cuda, cuda:N or mps")
    refused("doctor", "--device", "cpu", "--steps", 7, says="use more than 7")


def test_readme_does_not_claim_a_gpu_without_a_record():
    recorded = list((ROOT / "nbs" / "experiments" / "results").glob("doctor_cuda*"))
    said = "not run on a GPU by us" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert said != bool(recorded)


# --- one clear line each --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    (["--objective", "simclear"], "objective 'simclear' in 'simclear' is unknown: use one of simclr"),
    (["--encoder", "resnet"], "encoder 'resnet' is unknown"),
    (["--steps", "0"], "steps = '0'"),
    (["--steps", "many"], "steps = 'many'"),
    (["--options", "{simclr"], "options = '{simclr': not valid JSON"),
    (["--data", "no/such/folder"], "source 'no/such/folder' is neither a known name nor an existing path"),
    (["--data", "phantom:moon"], "preset 'moon' is unknown"),
    (["--batch", "1"], "batch of 1 for simclr"),
    (["--batch", "500"], "batch of 500 from"),
    (["--size", "20"], "each side must be a multiple of"),
    (["--device", "abacus"], "device 'abacus' is unknown"),
    (["--objective", "spark"], "spark"),
], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_pretrain_refuses(args, says, tmp_path):
    refused(*TINY, *args, "--out", tmp_path / "run", says=says)


def test_pretrain_refuses_a_folder_of_a_size_smaller_than_the_patch(tmp_path):
    import numpy as np
    import pandas as pd

    from tasl_lab.data.imageset import ImageSet, Info
    n = 12
    table = pd.DataFrame({"patient": [f"p{i}" for i in range(n)], "split": ["train"] * n, "site": ["a"] * n})
    ImageSet(np.random.default_rng(0).integers(0, 255, (n, 1, 4, 4), dtype=np.uint8), Info("small"), table=table).save(tmp_path / "small")
    refused("pretrain", "--data", tmp_path / "small", "--encoder", "vit-tiny", "--batch", 4, "--steps", 1, "--out", tmp_path / "run", says="(4, 4) pixels")


def test_failures_of_other_kinds_are_one_line_with_exit_code_1(monkeypatch, tmp_path):
    def broken(*a, **kw): raise MemoryError("no room")
    monkeypatch.setattr("tasl_lab.data.sources.load", broken)
    result = call(*TINY, "--out", tmp_path / "run")
    assert result.exit_code == 1 and result.stderr.strip() == "failed: MemoryError: no room (TASL_TRACEBACK=1 shows where)"
    monkeypatch.setenv("TASL_TRACEBACK", "1")
    assert isinstance(call(*TINY, "--out", tmp_path / "run").exception, MemoryError)


# --- notebooks ------------------------------------------------------------------------------------------------------------------------

STANDIN = ["data: list[str] = ['phantom']\nout: str = 'runs/x'\npreset: str = 'smoke'", """from pathlib import Path
from tasl_lab.core import InputError, write_json
if preset == "smoke" and "refuse" in out: raise InputError("set 'x': no picture in split 'train'")
print("trained", *data)
write_json(Path(out) / "results.json", {"data": data, "preset": preset})
Path(out, "report.html").write_text("<p>report</p>")"""]


@pytest.fixture
def standin(tmp_path, monkeypatch) -> Path:
    "A small notebook in place of the experiment."
    cells = [nbformat.v4.new_code_cell(text) for text in STANDIN]
    cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "templates" / "alignment.ipynb"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    monkeypatch.setattr("tasl_lab.batch.runner.template", lambda name: path.with_name(f"{name}.ipynb"))
    return path


def test_demo_runs_the_experiment_and_says_where_the_report_is(standin, tmp_path):
    out = tmp_path / "demo"
    result = call("demo", "--data", "brain", "--data", tmp_path, "--out", out)
    assert result.exit_code == 0 and f"report: {out / 'report.html'} (took " in result.stdout and "trained brain" in result.stderr
    assert json.loads((out / "results.json").read_text()) == {"data": ["brain", str(tmp_path)], "preset": "demo"}
    (out / "kept").write_text("x")
    answer = json.loads(call("demo", "--out", out, "--quiet", "--json").stdout)
    assert answer["report"] == str(out / "report.html") and (out / "kept").exists()
    assert json.loads((out / "results.json").read_text())["data"] == ["brain", "phantom"]
    assert call("demo", "--out", out, "--fresh").exit_code == 0 and not (out / "kept").exists()


def test_what_loads_monai_says_so_on_a_terminal(standin, monkeypatch, tmp_path):
    "Before it loads, and not with --quiet; elsewhere stderr holds what the commands say."
    told = []
    monkeypatch.setattr(cli, "_loading", told.append)
    for options in ([], ["--quiet"]):
        assert call("demo", "--out", tmp_path / "demo", *options).exit_code == 0
        assert call(*TINY, "--out", tmp_path / f"run{len(told)}", *options).exit_code == 0
    assert told == [False, False, True, True]
    assert call(*TINY, "--out", tmp_path / "run1").exit_code == 0 and len(told) == 4, "what is finished needs no MONAI"


HYPOTHESES = """
- {id: P1, statement: simclr leads, metric: auroc, task: "classification:class", data: "phantom:texture", a: simclr, b: masked,
   direction: greater, margin: .02, seeds: 3, budget: {steps: 150, batch: 96, labels: 120}}
"""


def test_preregister_writes_once_and_loads_no_torch(tmp_path):
    source, out = tmp_path / "mine.yaml", tmp_path / "claims.json"
    source.write_text(HYPOTHESES)
    code = (f"import sys\nfrom tasl_lab.cli import app\ntry: app(['preregister', {str(source)!r}, '--out', {str(out)!r}, '--json'])\n"
            "except SystemExit: print('torch' in sys.modules, file=sys.stderr)")
    ran = python(code)
    assert json.loads(ran.stdout)["hypotheses"] == 1 and ran.stderr.strip() == "False"
    assert json.loads(ran.stdout)["sha256"] == json.loads(out.read_text())["sha256"]
    refused("preregister", source, "--out", out, says="never overwritten")
    source.write_text(HYPOTHESES.replace("margin", "margins"))
    refused("preregister", source, "--out", tmp_path / "other.json", says="hypothesis 'P1'")


def test_matrix_and_gate_refuse_before_any_work(tmp_path):
    refused("matrix", "--preset", "huge", "--out", tmp_path / "x", says="preset 'huge' is unknown")
    refused("matrix", "--data", "no/such/folder", "--out", tmp_path / "x", says="source 'no/such/folder'")
    refused("gate", "--objectives", "simclr,nothing", "--out", tmp_path / "x", says="nothing")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_matrix_writes_tables_and_goes_on_from_what_is_finished(tmp_path):
    result = call("matrix", "--preset", "smoke", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert {c["arm"] for c in answer["cells"]} == {"simclr", "spark", "simclr again", "random", "supervised"} and "min left" in result.stderr
    tables = {p.stem for p in Path(answer["tables"]).glob("*.parquet")}
    assert {"cells", "conditions", "twins", "power", "factors", "runs", "history", "measured"} <= tables
    start = time.monotonic()
    again = call("matrix", "--preset", "smoke", "--out", tmp_path, "--quiet")
    assert again.exit_code == 0 and "tables:" in again.stdout and not again.stderr and time.monotonic() - start < 30


@pytest.mark.slow
def test_gate_says_who_passed(tmp_path):
    args = ["--size", "32", "--pictures", "150", "--steps", "10", "--labels", "24", "--seeds", "2", "--objectives", "simclr,masked", "--out", tmp_path]
    text, answer = call("gate", *args), json.loads(call("gate", *args, "--json", "--quiet").stdout)
    assert text.exit_code == 0 and "of the pictures saved" in text.stdout and "of 6 done" in text.stderr
    assert [o["objective"] for o in answer["objectives"]] == ["simclr", "masked"] and {"cost", "pictures", "seconds"} <= set(answer["savings"][0])


def test_demo_refuses(standin, tmp_path):
    refused("demo", "--data", "no/such/folder", "--out", tmp_path / "x", says="source 'no/such/folder'")
    refused("demo", "--preset", "huge", "--out", tmp_path / "x", says="preset 'huge' is unknown")
    refused("demo", "--fresh", "--out", standin.parent, says="holds no earlier run")
    assert standin.exists() and not (tmp_path / "x").exists()
    result = call("demo", "--preset", "smoke", "--out", tmp_path / "refuse")
    assert result.exit_code == 2 and result.stderr.strip() == "error: set 'x': no picture in split 'train'"


def test_run_takes_parameters_as_texts(standin, tmp_path):
    result = call("run", standin, "-p", "data", "a,b", "-p", f"out={tmp_path / 'run'}", "-p", "preset", "demo", "--out", tmp_path / "run")
    assert result.exit_code == 0 and str(tmp_path / "run" / "alignment.ipynb") in result.stdout
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"data": ["a", "b"], "preset": "demo"}
    refused("run", standin, "-p", "dat", "a", "--out", tmp_path / "y", says="parameter 'dat' is unknown: it has data (list[str])")
    refused("run", standin, "-p", "preset", "a", "-p", "preset", "b", says="a name is given twice")
    refused("run", tmp_path / "none.ipynb", says="no such notebook")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name != "posix", reason="sends Unix signals")
def test_ctrl_c_leaves_a_checkpoint_that_the_next_call_resumes(tmp_path):
    args = [*TINY[:-4], "--steps", "400", "--batch", "8", "--every", "5", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", "from tasl_lab.cli import app; app()", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < end: time.sleep(.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped after step" in said and "Traceback" not in said, said
    from safetensors import safe_open
    with safe_open(str(tmp_path / "run" / "checkpoint.safetensors"), "pt") as f: step = int(f.metadata()["step"])
    assert step % 5 == 0 and f"after step {step} of 400" in said
    from tasl_lab import training
    from tasl_lab.config import PretrainConfig
    from tasl_lab.data.sources import load
    config = PretrainConfig.of(encoder="vit-tiny", steps=400, batch=8)
    assert next(training.pretrain(config, load("phantom", 32, n=60), tmp_path / "run")).step == step + 1
