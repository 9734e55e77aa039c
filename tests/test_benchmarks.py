"""The benchmarks still run, and what they report is what they measured."""
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness
    return harness


def rows(**seconds):
    "One row per contender and round, ten units each."
    return [{"benchmark": "b", "case": "c", "contender": name, "round": r, "unit": "units", "units": 10, "seconds": s}
            for name, taken in seconds.items() for r, s in enumerate(taken)]


def test_a_ratio_is_taken_within_its_round(harness):
    "The second round is slow for both: the rates differ twofold between rounds, the ratio does not."
    found = harness.summary(pd.DataFrame(rows(tasl_lab=[1, 2, 1], other=[3, 6, 4]))).set_index("contender")
    assert found.loc["other", ["ratio", "lowest", "highest", "rounds"]].tolist() == [3, 3, 4, 3]
    assert found.loc["tasl_lab", ["rate", "ratio"]].tolist() == [10, 1]


def test_contenders_take_turns_and_are_freed(harness):
    called, freed = [], []

    class Contender:
        def __init__(self, name): self.name = name
        def __call__(self): return called.append(self.name) or 1
        def close(self): freed.append(self.name)

    found = harness.run(harness.Race("b", "c", {n: Contender(n) for n in ("tasl_lab", "x", "y")}), rounds=3, tell=lambda *a, **kw: None)
    assert len(found) == 9 and len(called) == 12 and freed == ["tasl_lab", "x", "y"]
    by_round = [called[i:i + 3] for i in range(0, 12, 3)]
    assert all(sorted(r) == ["tasl_lab", "x", "y"] for r in by_round) and len({r[0] for r in by_round[1:]}) == 3


def test_records_hold_what_they_show(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.keep("x", rows(tasl_lab=[1], other=[2]), "the command", busy=3.)
    told = json.loads(path.read_text())
    assert told["command"] == "the command" and told["busy"] == 3 and [r["ratio"] for r in told["summary"]] == [1, 2]
    assert len(pd.read_parquet(path.with_suffix(".parquet"))) == 2 and told["precision"] in ("bf16", "fp32")


def test_a_benchmark_may_be_kept_in_parts(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    part = lambda case, *rates: [r | {"case": case} for r in rows(tasl_lab=rates)]
    harness.keep("x", part("first", 1, 1), "one", workers={"first": 0})
    harness.keep("x", part("second", 1), "two", workers={"second": 2})
    path = harness.keep("x", part("first", 2), "three")
    told, kept = json.loads(path.read_text()), pd.read_parquet(path.with_suffix(".parquet"))
    assert list(kept.case) == ["second", "first"] and kept.commit.notna().all() and len(told["summary"]) == 2
    assert told["workers"] == {"first": 0, "second": 2} and told["command"] == "three"
    monkeypatch.setattr(harness, "machine", lambda: told | {"cpu": "another"})
    harness.keep("x", part("third", 1), "four")
    assert list(pd.read_parquet(path.with_suffix(".parquet")).case) == ["third"]


def gets_through(name, only=""):
    done = subprocess.run([sys.executable, FOLDER / "run.py", name, "--quick", "--only", only], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"growth": '"exponents"', "budget": '"minutes of all runs"'}.get(name, "ours 1.00 times (1.00 to 1.00)") in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name, only", [("start", ""), ("views", "grey")], ids=lambda v: v)
def test_a_quick_run_gets_through(name, only): gets_through(name, only)


@pytest.mark.full
@pytest.mark.parametrize("name", ["probes", "growth", "budget", "overhead", "pretraining"])
def test_a_longer_run_gets_through(name): gets_through(name)
