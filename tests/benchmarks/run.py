"""The benchmarks: `python tests/benchmarks/run.py pretraining overhead views [--quick] [--keep]`.

stable-pretraining, kornia and timm are no dependencies: contenders that need them run in an environment that has them, and are left out elsewhere.
Any other work on the machine spoils the figures, most of all where all cores are used: the share of the machine that is busy at the start, in %, is recorded.

A name is a module of this folder with `races(quick) -> list[Race]` and, where there is more to record, `extra(quick) -> dict`, or a generator of
growing ones. With several names each has a process of its own, so that what one sets does not reach the next.
"""
import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from inspect import isgenerator
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # also where the library is not installed
import harness  # noqa: E402


def asked(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="modules: pretraining, overhead, views, probes, ...")
    parser.add_argument("--quick", action="store_true", help="small cases, one round: does everything still run?")
    parser.add_argument("--only", default="", metavar="PATTERN", help="races in whose benchmark and case this regular expression is found")
    parser.add_argument("--rounds", type=int, default=None, help="how often each contender runs, 5 by default and 1 with --quick")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--keep", action="store_true", help="write speed_NAME.parquet and .json to nbs/experiments/results")
    return parser.parse_args(arguments)


def bench(name: str, given) -> None:
    module = importlib.import_module(name)
    races = [r for r in module.races(given.quick) if re.search(given.only, f"{r.benchmark}: {r.case}")]
    if given.list: return print(*(f"{r.benchmark}: {r.case}: {', '.join(r.contenders)}" for r in races), sep="\n")
    busy = psutil.cpu_percent(1.)
    if busy > 10: print(f"other work takes {busy:.0f} % of the machine: these figures will not hold")
    rows, command = [], " ".join(["python tests/benchmarks/run.py", *map(shlex.quote, sys.argv[1:])])
    for race in races:
        rows += harness.run(race, given.rounds or (1 if given.quick else 5))
        if given.keep: harness.keep(name, rows, command, busy=busy)  # after each race: whoever stops here has what is measured
    for more in _extras(module, given.quick):
        if given.keep: harness.keep(name, rows, command, busy=busy, **more)
    print(json.dumps(more, indent=1, default=str))


def _extras(module, quick):
    "What a module records beside its races, a generator step by step: the last one is all."
    more = module.extra(quick) if hasattr(module, "extra") else {}
    yield from more if isgenerator(more) else [more]


def main() -> int:
    given = asked()
    if len(given.names) == 1: return bench(given.names[0], given) or 0
    rest = [a for a in sys.argv[1:] if a not in given.names]
    return max(subprocess.run([sys.executable, __file__, name, *rest]).returncode for name in given.names)


if __name__ == "__main__": sys.exit(main())
