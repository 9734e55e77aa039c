"""Training from a file that is larger than the memory allowed, against the same pictures in memory.

`python tests/benchmarks/run.py cache --keep`: 200,000 grey pictures of 64x64 pixels, 819 MB, with 256 MB allowed: more than three times as much. Every turn
trains an equal part of an epoch, in shuffled order, after the file was put out of the page cache. "from a file, told ahead" also names each next
batch before the step. What the process itself holds (`RssAnon` of Linux: without pages of mapped files, which the system takes back when it needs
them) is taken in a process of its own for each way, beyond what the same training of two batches needs. Ends with 1 where the speed from the file
is below 80 % of that in memory, or the limit is broken.
"""
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from dask.utils import parse_bytes
from harness import Race

from tasl_lab.config import PretrainConfig
from tasl_lab.data.cache import opened
from tasl_lab.data.imageset import ImageSet, Info, _mapped
from tasl_lab.training import Run, batch_ids

FILE, MEMORY, AHEAD = "from a file", "in memory", "from a file, told ahead"
SHARE = .8  # of the speed in memory that is asked for


@dataclass(frozen=True)
class Case:
    pictures: int = 200_000
    side: int = 64
    limit: str = "256 MB"
    steps: int = 50        # of each turn
    batch: int = 96
    objective: str = "simclr"

    @property
    def bytes(self) -> int: return self.pictures * self.side ** 2

    def __str__(self): return f"{self.objective}, cnn-tiny, {self.side}x{self.side} grey, batch {self.batch}, {self.bytes / 1e6:.0f} MB with {self.limit}"


CASES = {True: Case(64_000, 64, "80 MB", 3, 32), False: Case()}  # quick or not


@cache
def folder() -> tempfile.TemporaryDirectory: return tempfile.TemporaryDirectory(prefix="tasl-cache-", dir=os.environ.get("TASL_BENCH"))


@cache
def file_of(case: Case) -> Path:
    "Noise, written a part at a time; on the disk of the folder for temporary files, or of `$TASL_BENCH`."
    path, r = Path(folder().name) / "pictures.npy", np.random.default_rng(0)
    whole = np.lib.format.open_memmap(path, "w+", np.uint8, (case.pictures, 1, case.side, case.side))
    for k in range(0, case.pictures, 4096): whole[k:k + 4096] = r.integers(0, 256, whole[k:k + 4096].shape, np.uint8)
    whole.flush()
    return path


def evict(path: Path, images) -> None:
    "Put a file out of the page cache: first out of this process, which would keep its pages there."
    if file := _mapped(images): file.madvise(mmap.MADV_DONTNEED)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally: os.close(handle)


def status(name: str) -> int:
    "A number of this process, in bytes, or of what it did, as Linux counts it."
    files = {"RssAnon": ("status", 1024), "read_bytes": ("io", 1)}
    where, unit = files[name]
    return int(Path(f"/proc/self/{where}").read_text().split(f"{name}:")[1].split()[0]) * unit


# --- speed ----------------------------------------------------------------------------------------------------------------------------

def training(case: Case, images) -> Run:
    return Run(PretrainConfig.of(objective=case.objective, batch=case.batch, steps=10 ** 6, watch=0), ImageSet(images, Info("noise")), "cpu")


def steps(run: Run, first: int, many: int, ahead: bool = False) -> list[float]:
    "Losses of some steps; with `ahead` each next batch is named before the step."
    c, losses = run.config, []
    for step in range(first, first + many):
        if ahead: run.data.ahead(batch_ids(run.pool, c.batch, c.seed, step + 1))
        losses.append(run.step(step).loss)
    return losses


class Turn:
    "One way: a call evicts the file and trains a part of an epoch."
    def __init__(self, case: Case, memory=None, ahead=False):
        self.case, self.memory, self.ahead, self.losses, self.rates, self.read = case, memory, ahead, [], [], 0

    @cached_property
    def run(self) -> Run: return training(self.case, opened(file_of(self.case), self.memory))

    def __call__(self) -> int:
        evict(file_of(self.case), self.run.data.images)
        before, start = status("read_bytes"), time.perf_counter()
        self.losses += steps(self.run, len(self.losses), self.case.steps, self.ahead)
        self.rates.append(self.case.steps * self.case.batch / (time.perf_counter() - start))
        self.read += status("read_bytes") - before
        return self.case.steps * self.case.batch


@cache
def ways(case: Case) -> dict[str, Turn]:
    "All ways; only `in memory` may hold the whole."
    return {FILE: Turn(case, case.limit), MEMORY: Turn(case, case.bytes + 4096), AHEAD: Turn(case, case.limit, True)}


def shares(turns: dict[str, Turn]) -> dict[str, float]:
    "Speed from the file as a share of that in memory, the median over rounds; the first, which warms up, left out."
    base = np.array(turns[MEMORY].rates[1:])
    return {name: float(np.median(np.array(turns[name].rates[1:]) / base)) for name in (FILE, AHEAD)}


# --- memory ---------------------------------------------------------------------------------------------------------------------------

def highest(work: Callable) -> int:
    "The most bytes of its own that this process held during a call."
    top, done = [status("RssAnon")], threading.Event()
    def watch():
        while not done.wait(.01): top.append(status("RssAnon"))
    thread = threading.Thread(target=watch)
    thread.start()
    try: work()
    finally:
        done.set()
        thread.join()
    return max(*top, status("RssAnon"))


def held(path: Path, case: Case, memory) -> float:
    "MB that a training on the file takes beyond the same training on two batches."
    few = np.load(path, mmap_mode="r")[:2 * case.batch].copy()
    steps(training(case, few), 0, 6)
    start = status("RssAnon")
    return (highest(lambda: steps(training(case, opened(path, memory)), 0, case.steps)) - start) / 1e6


def alone(work: Callable, *given):
    "In a fresh process."
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(work, *given).result()


# --- the record -----------------------------------------------------------------------------------------------------------------------

def races(quick: bool) -> list[Race]: return [Race("cache", str(CASES[quick]), dict(ways(CASES[quick])))]


def measured(case: Case) -> dict:
    "What is recorded beside the race."
    turns, whole = ways(case), case.bytes + 4096
    seen = {name: len(t.losses) * case.batch * case.side ** 2 for name, t in turns.items()}
    return {"limit, MB": parse_bytes(case.limit) / 1e6, "set, MB": case.bytes / 1e6, "share of the speed in memory": shares(turns),
            "read from the disk / pictures seen": {name: t.read / seen[name] for name, t in turns.items()},
            "equal losses": turns[FILE].losses == turns[MEMORY].losses == turns[AHEAD].losses,
            "held beyond two batches, MB": {name: alone(held, file_of(case), case, memory) for name, memory in ((FILE, case.limit), (MEMORY, whole))}}


def faults(record: dict, share: float = SHARE) -> list[str]:
    "What is not as it should be."
    took, limit, slow = record["held beyond two batches, MB"], record["limit, MB"], record["share of the speed in memory"][FILE]
    said = {"the set is not three times the limit": record["set, MB"] < 3 * limit, "the losses differ": not record["equal losses"],
            f"{took[FILE]:.0f} MB held, {limit:.0f} allowed": took[FILE] > limit,
            f"in memory {took[MEMORY]:.0f} MB were seen, of {record['set, MB']:.0f}: the measure is blind": took[MEMORY] < .9 * record["set, MB"],
            f"{slow:.2f} of the speed in memory, {share} asked for": slow < share}
    return [text for text, wrong in said.items() if wrong]


def extra(quick: bool) -> Iterator[dict]:
    record = measured(CASES[quick])
    yield record
    if wrong := faults(record, 0 if quick else SHARE): sys.exit("; ".join(wrong))
