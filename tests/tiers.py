"""The tiers of the tests: every stage is named, timed and held to an allowance.

    python tests/tiers.py fast            what `make test` runs
    python tests/tiers.py slow            what `make test-slow` runs
    python tests/tiers.py fast --only ruff

A stage fails when its command fails or when it takes more than 1.5 times its allowance (it is stopped at 3 times). The other stages
still run, so that one reading shows everything. On a slower machine TASL_PATIENCE=2 doubles every allowance.
"""
import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TOLERANCE, LIMIT = 1.5, 3.0  # times the allowance: a failure, and the end


@dataclass(frozen=True)
class Stage:
    name: str
    command: str        # run in the root of the repository with the environment's programs first on PATH
    allowance: float    # seconds on two slow cores


WORKERS = min(os.cpu_count() or 2, 8)
NBTEST = f"nbdev-test --n-workers {WORKERS} --timing --cell-timeout"
PYTEST = "python -m pytest -q --durations=20 --durations-min=0.05"
TIERS = {
    "fast": [
        Stage("in step", "python tests/in_step.py", 30),
        Stage("ruff", "ruff check nbs tests .ci", 10),
        Stage("notebooks", f"{NBTEST} 300 --skip-folder-re '^([_.]|guide$|lessons$|experiments$)'", 360),
        Stage("pytest", f"{PYTEST} -n {WORKERS} --dist loadfile", 360),
        Stage("smoke demo", "tasl demo --preset smoke --out runs/smoke", 120),
    ],
    "slow": [
        Stage("guide", f"{NBTEST} 600 nbs/guide", 50),
        Stage("lessons", f"{NBTEST} 600 nbs/lessons", 180),
        Stage("experiments", f"{NBTEST} 600 nbs/experiments", 330),
        Stage("docs", "python .ci/docs.py build", 120),
        Stage("slow pytest", f"{PYTEST} -m slow --timeout=900", 1120),
    ],
    "full": [
        Stage("full pytest", f"{PYTEST} -m full --timeout=0", 3 * 3600),
    ],
}


def environment() -> dict[str, str]:
    "The environment of every stage: this Python's programs first, one thread per worker process."
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


def run(stage: Stage, patience: float = 1.0) -> tuple[float, str]:
    "Seconds taken and 'ok', or why the stage failed."
    allowance, start = stage.allowance * patience, time.monotonic()
    process = subprocess.Popen(stage.command, shell=True, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(timeout=LIMIT * allowance)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    if code is None: return seconds, f"FAILED: stopped after {LIMIT:g} times its allowance"
    if code: return seconds, f"FAILED: exit status {code}"
    if seconds > TOLERANCE * allowance: return seconds, f"FAILED: more than {TOLERANCE:g} times its allowance"
    return seconds, "ok"


def report(rows: list[tuple[str, Stage, float, str]], patience: float) -> str:
    "The table of stages: seconds taken, seconds allowed, result."
    lines = [f"{'tier':6}{'stage':14}{'seconds':>9}{'allowed':>9}  result"]
    lines += [f"{tier:6}{s.name:14}{seconds:9.1f}{s.allowance * patience:9.0f}  {result}" for tier, s, seconds, result in rows]
    return "\n".join([*lines, f"{'':6}{'all':14}{sum(r[2] for r in rows):9.1f}"])


def main() -> int:
    p = argparse.ArgumentParser(description="Run the tiers of the tests.")
    p.add_argument("tiers", nargs="+", choices=TIERS)
    p.add_argument("--only", metavar="STAGE", help="run the stage of this name alone")
    a = p.parse_args()
    patience = float(os.environ.get("TASL_PATIENCE", "1"))
    stages = [(t, s) for t in a.tiers for s in TIERS[t] if a.only in (None, s.name)]
    if not stages: p.error(f"no stage named {a.only!r} there; stages: {', '.join(s.name for t in a.tiers for s in TIERS[t])}")
    rows = []
    for tier, stage in stages:
        print(f"\n=== {tier}: {stage.name}: {stage.command}", flush=True)
        rows.append((tier, stage, *run(stage, patience)))
    print("\n" + report(rows, patience))
    failed = [s.name for _, s, _, result in rows if result != "ok"]
    if failed: print(f"FAILED: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
