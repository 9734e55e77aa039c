"""Several ways to do the same work, timed side by side: interleaved in one process, so that a noisy clock is noisy for all.

A benchmark is a list of `Race`s. Each contender of a race is a function that does a portion of the work and returns how many units
(pictures, fits, resamples) it did. What counts is the ratio within a round; medians over rounds are reported, with the lowest and highest.
"""
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "nbs" / "experiments" / "results"
OURS = "tasl_lab"


@dataclass
class Race:
    "One table row per contender: the same work, done in several ways."
    benchmark: str                        # "pretraining", "views", ...
    case: str                             # what is held equal: objective, encoder, batch, size
    contenders: dict[str, Callable[[], int]] = field(default_factory=dict)  # name -> does a portion, returns the units done
    unit: str = "pictures"


def run(race: Race, rounds: int = 5, warm: int = 1, tell=print) -> list[dict]:
    """One row per contender and round, contenders in turn within each round, in an order that rotates; warm-up rounds are not kept.

    What a contender holds is freed at the end by its `close()`, if it has one."""
    names, rows = list(race.contenders), []
    for r in range(-warm, rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            units = race.contenders[name]()
            seconds = time.perf_counter() - start
            if r >= 0:
                rows.append({"benchmark": race.benchmark, "case": race.case, "contender": name, "round": r, "unit": race.unit,
                             "units": units, "seconds": seconds})
    for contender in race.contenders.values(): getattr(contender, "close", lambda: None)()
    for row in summary(pd.DataFrame(rows)).itertuples():
        ratio = f"ours {row.ratio:.2f} times ({row.lowest:.2f} to {row.highest:.2f})"
        tell(f"{race.benchmark}  {race.case}  {row.contender}: {row.rate:,.1f} {race.unit}/s, {ratio}", flush=True)
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    "Per contender the median rate, and how many times faster we are: median, lowest and highest over rounds, each ratio within its round."
    rows, out = rows.assign(rate=rows.units / rows.seconds), []
    for (benchmark, case), g in rows.groupby(["benchmark", "case"], sort=False):
        by_round = g.pivot(index="round", columns="contender", values="rate")
        ours = by_round[OURS] if OURS in by_round else by_round.iloc[:, 0]
        for name in g.contender.unique():
            ratio = ours / by_round[name]
            out.append({"benchmark": benchmark, "case": case, "contender": name, "unit": g.unit.iloc[0], "rate": by_round[name].median(),
                        "ratio": ratio.median(), "lowest": ratio.min(), "highest": ratio.max(), "rounds": len(ratio)})
    return pd.DataFrame(out)


def _held() -> float:
    "Megabytes this process held at most. `ru_maxrss` alone would do, but Linux hands the parent's down to a new process."
    status = Path("/proc/self/status")
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


def _peak(work, given, pipe):
    work(*given)
    pipe.send(_held())


def peak_memory(work: Callable, *given) -> float:
    "Megabytes that a fresh process held at most while it ran `work(*given)`, imports included; a function at the top of a module."
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(work, given, theirs))
    process.start()
    theirs.close()
    megabytes = mine.recv()  # EOFError where the work failed
    process.join()
    return megabytes


def machine() -> dict:
    "What the figures stand on."
    import torch

    from tasl_lab.core import pick_precision
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    names = "lightly", "stable-pretraining", "kornia", "monai", "scikit-learn", "torchvision"
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "precision": pick_precision(device=torch.device("cpu")),
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit, "versions": {n: _version(n) for n in names}}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version
    try: return version(name)
    except PackageNotFoundError: return "not installed"


def keep(name: str, rows: list[dict], command: str, **more) -> Path:
    """Write the rows as a parquet, and beside it the record with their summary; returns the record's path.

    What a machine like this one recorded of other cases stays, so that a long benchmark may be run in parts; each row names its commit."""
    path, here = RESULTS / f"speed_{name}.json", machine()
    record, table = _recorded(path, here)
    record |= here | {"command": command}
    record |= {k: record.get(k, {}) | v if isinstance(v, dict) else v for k, v in more.items()}
    if rows:
        new = pd.DataFrame(rows).assign(commit=here["commit"])
        table = pd.concat([table[~table.case.isin(new.case)], new], ignore_index=True) if len(table) else new
        table.to_parquet(path.with_suffix(".parquet"), index=False)
        record["summary"] = summary(table).to_dict("records")
    path.write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n")
    return path


def _recorded(path: Path, here: dict) -> tuple[dict, pd.DataFrame]:
    "Record and rows that were kept on a machine like this one, or nothing."
    record = json.loads(path.read_text()) if path.exists() else {}
    if any(record.get(k) != here[k] for k in ("cpu", "cores", "precision", "torch")): return {}, pd.DataFrame()
    rows = path.with_suffix(".parquet")
    return record, pd.read_parquet(rows) if rows.exists() else pd.DataFrame()
