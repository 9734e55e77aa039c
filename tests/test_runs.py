"""Records of runs: found by what they hold, filtered, compared, deleted safely, and read by other tools."""
import json
import shutil
from importlib.util import find_spec

import pandas as pd
import pytest
from test_cli import call, refused

from tasl_lab.batch import runs
from tasl_lab.core import InputError, write_json


def folder(place, state="finished", loss=2., **config):
    "A run as `pretrain` leaves it, without the training."
    place.mkdir(parents=True)
    known = {"objective": "simclr", "encoder": "cnn-tiny", "steps": 3, "seed": 0, "lr": None, "options": {}} | config
    pd.DataFrame({"step": [1, 2, 3], "loss": [4., 3., loss], "note": "", "part:nt_xent": [4., 3., loss], "seconds:views": .1}).to_parquet(place / runs.CURVES)
    if state == "finished":
        write_json(place / runs.RECORD, {"id": f"id-{place.name}-0000", "config": known, "data": {"name": "brain", "sha256": "d" * 64}, "note": "",
                                         "budget": {"steps": 3, "seconds": 1.5, "pictures": 48}, "environment": {"torch": "2.4", "commit": None}})
    else:
        import numpy as np
        from safetensors.numpy import save_file
        save_file({"x": np.zeros(1, "float32")}, place / runs.CHECKPOINT, {"config": json.dumps(known), "data": "d" * 64, "step": "2", "seconds": "1.0"})
    return place


@pytest.fixture
def top(tmp_path):
    folder(tmp_path / "runs" / "a")
    folder(tmp_path / "runs" / "b", seed=1, loss=1.5)
    folder(tmp_path / "runs" / "deep" / "c", "stopped", objective="mae")
    return tmp_path / "runs"


def test_only_what_carries_our_mark_is_a_run(top):
    for name, text in (("list", "[1]"), ("broken", "{"), ("foreign", '{"id": 1, "name": "x"}'), ("odd", '{"id": 1, "config": 3, "data": 1, "budget": 2}')):
        (top / name).mkdir()
        (top / name / runs.RECORD).write_text(text)
    (top / "not-ours").mkdir()
    (top / "not-ours" / runs.CHECKPOINT).write_bytes(b"\x80\x04.")
    (top / "link").symlink_to(top / "a")
    (top / "linked-record").mkdir()
    (top / "linked-record" / runs.RECORD).symlink_to(top / "a" / runs.RECORD)
    assert {p.name: r["state"] for p, r in runs.find_runs(top).items()} == {"a": "finished", "b": "finished", "c": "stopped"}


@pytest.mark.parametrize("where, names", [
    ((), "abc"), (("objective=simclr",), "ab"), (("objective!=simclr",), "c"), (("seed>0",), "b"), (("loss<=2",), "abc"), (("lr=none",), "abc"),
    (("seed=0", "state=finished"), "a"), (("data.name=BRAIN",), "ab"), (("budget.pictures>=48",), "ab")])
def test_filters(top, where, names):
    rows = [runs.row_of(p, r) for p, r in runs.find_runs(top).items()]
    assert "".join(r["run"][-1] for r in runs.select(rows, where)) == names


@pytest.mark.parametrize("where, says", [("colour=red", "no run has that"), ("steps", "not understood"), ("", "not understood")])
def test_wrong_filters(top, where, says):
    with pytest.raises(InputError, match=says): runs.select([runs.row_of(p, r) for p, r in runs.find_runs(top).items()], [where])


def test_compare_shows_what_differs_and_nothing_else(top):
    rows = {r["what"]: (r["part"], r["a"], r["b"]) for r in runs.compare(top / "a", top / "b")}
    assert rows.pop("id") and rows == {"seed": ("setting", 0, 1), "loss": ("result", 2., 1.5), "part:nt_xent": ("result", 2., 1.5)}
    assert runs.compare(top / "a", top / "a") == []


# ---------- deleting ----------

def keeps(top, names, says):
    "Nothing goes, and the reason is told."
    with pytest.raises(InputError, match=says): runs.delete_runs([top / "b", *(top / n for n in names)])
    assert set(runs.find_runs(top)) == {top / "a", top / "b", top / "deep" / "c"}


def test_what_may_not_go_stays_and_so_does_the_rest(top):
    (top / "mine").mkdir()
    (top / "mine" / "thesis.tex").write_text("years of work")
    (top / "link").symlink_to(top / "a")
    (top / "file").write_text("")
    for name, says in (("mine", "no mark"), ("link", "is a link"), ("file", "no such folder"), ("nothing", "no such folder"), ("deep", "no mark"),
                       (".", "no mark")):
        keeps(top, [name], says)
    assert (top / "mine" / "thesis.tex").is_file()


def test_a_run_within_a_run_is_not_lost_by_accident(top):
    shutil.move(top / "a", top / "b" / "a")
    with pytest.raises(InputError, match="holds another run"): runs.delete_runs([top / "b"])
    assert {p.name for p in runs.delete_runs([top / "b", top / "b" / "a"])} == {"a", "b"} and not (top / "b").exists()


def test_links_inside_are_removed_and_not_followed(top, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep.txt").write_text("keep")
    (top / "a" / "out").symlink_to(tmp_path / "outside")
    (top / "a" / "b").symlink_to(top / "b")
    runs.delete_runs([top / "a"])
    assert not (top / "a").exists() and (tmp_path / "outside" / "keep.txt").is_file() and (top / "b" / runs.RECORD).is_file()


# ---------- other tools ----------

@pytest.mark.slow
@pytest.mark.skipif(not find_spec("tensorboard"), reason="TensorBoard is not installed")
def test_tensorboard_reads_our_curves(top, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = runs.to_tensorboard(runs.find_runs(top), tmp_path / "events")
    assert len(list(out.iterdir())) == 3
    read = EventAccumulator(str(next(p for p in out.iterdir() if p.name.startswith("b-")))).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 4.), (2, 3.), (3, 1.5)] and "part/nt_xent" in read.Tags()["scalars"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mlflow"), reason="MLflow is not installed")
def test_mlflow_reads_our_curves(top, tmp_path):
    uri = runs.to_mlflow(runs.find_runs(top), tmp_path / "mlruns")
    from mlflow import MlflowClient
    client = MlflowClient(uri)
    kept = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("tasl-lab").experiment_id])}
    assert set(kept) == {"a", "b", "c"} and kept["b"].data.params["seed"] == "1" and kept["c"].info.status == "KILLED" != kept["a"].info.status
    assert [(m.step, m.value) for m in client.get_metric_history(kept["b"].info.run_id, "loss")] == [(1, 4.), (2, 3.), (3, 1.5)]
    assert kept["a"].data.tags["budget.pictures"] == "48"


def test_a_missing_tool_is_named_with_its_remedy(top, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    for export in (runs.to_tensorboard, runs.to_mlflow):
        with pytest.raises(InputError, match=r"tasl-lab\[records\]"): export(runs.find_runs(top), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------- the command ----------

def test_commands(top):
    listed = json.loads(call("runs", "list", top, "--where", "objective=simclr", "--json").stdout)
    assert [r["run"][-1] for r in listed] == ["a", "b"] and listed[1]["loss"] == 1.5
    assert "simclr" in call("runs", "list", top).stdout
    differs = call("runs", "compare", top / "a", top / "b")
    assert differs.exit_code == 1 and "seed" in differs.stdout and call("runs", "compare", top / "a", top / "a").exit_code == 0
    refused("runs", "list", top, "--where", "colour=red", says="no run has that")
    refused("runs", "compare", top / "a", top, says="holds no run")


def test_delete_asks_first(top):
    from typer.testing import CliRunner

    from tasl_lab import cli
    asked = CliRunner().invoke(cli.app, ["runs", "delete", str(top / "a")], input="n\n")
    assert asked.exit_code == 1 and (top / "a").is_dir()
    refused("runs", "delete", top, "--yes", says="no mark")
    assert json.loads(call("runs", "delete", top / "a", top / "b", "--yes", "--json").stdout)["deleted"] == [str(top / "a"), str(top / "b")]
    assert not (top / "a").exists()


@pytest.mark.parametrize("typed, offered", [("tasl ru", {"run", "runs"}), ("tasl runs ", {"list", "compare", "delete", "export"}),
                                            ("tasl export --t", {"--to"})])
def test_shells_complete_commands(typed, offered):
    "What bash asks, and what it is told."
    from typer.testing import CliRunner

    from tasl_lab import cli
    asked = {"_TASL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    assert set(CliRunner().invoke(cli.app, [], prog_name="tasl", env=asked).stdout.split()) == offered
    script = CliRunner().invoke(cli.app, [], prog_name="tasl", env={"_TASL_COMPLETE": "source_bash"}).stdout
    assert "complete" in script and "tasl" in script


def commands(group, path=""):
    "Every command with the words that call it."
    for name, c in group.commands.items(): yield from commands(c, f"{path} {name}") if hasattr(c, "commands") else [(f"{path} {name}".strip(), c)]


WANTED = {"run", "sweep", "demo", "lab", "objectives", "data list", "data check", "data fetch", "pretrain", "embed", "evaluate", "matrix", "gate",
          "audit", "advise", "report", "doctor", "export", "runs list", "runs compare", "runs delete", "runs export"}


def test_every_command_is_there_with_examples_and_json():
    import typer

    from tasl_lab import cli
    there = dict(commands(typer.main.get_command(cli.app)))
    assert set(there) >= WANTED
    for name, c in there.items():
        assert f"tasl {name}" in (c.epilog or ""), f"tasl {name} --help shows no example"
        assert "--json" in [o for p in c.params for o in p.opts], f"tasl {name} has no --json"
    told = call("--help").stdout
    assert "Exit codes: 0 done; 1" in told and "--install-completion" in told


def test_no_help_and_no_list_of_runs_waits_for_what_is_heavy(top):
    "In one new process: the help of every command, then the runs of a folder."
    import subprocess
    import sys

    import typer

    from tasl_lab import cli
    calls = [[*name.split(), "--help"] for name, _ in commands(typer.main.get_command(cli.app))] + [["runs", "list", str(top), "--json"]]
    code = (f"import sys\nfrom typer.testing import CliRunner\nfrom tasl_lab import cli\n"
            f"for c in {calls!r}: assert CliRunner().invoke(cli.app, c).exit_code == 0, c\n"
            "print('heavy:', *[m for m in ('torch', 'monai', 'sklearn', 'plotly', 'papermill', 'dask') if m in sys.modules])")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["heavy:"] and len(calls) > len(WANTED), ran.stdout + ran.stderr
