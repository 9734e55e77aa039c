"""How long it takes until something happens: imports and commands, each in a fresh process, in turn.

The ratio of a row says how many times longer it takes than `import tasl_lab`; `python` alone is what no library can undercut. Seconds of
processor time stand in `extra`: a busy machine does not alter them.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

from harness import OURS, Race

PYTHON, PROGRAM = sys.executable, str(Path(sys.executable).parent / "tasl")
IMPORTS = {OURS: "import tasl_lab", "python": "pass", "import tasl_lab.cli": "import tasl_lab.cli"}
LARGE = {f"import {name}": f"import {name}" for name in ("torch", "monai")}
COMMANDS = ("--version", "--help", "objectives", "data list", "pretrain --help")


def calls(quick: bool) -> dict:
    "Contender -> what is started; the large libraries only where there is time."
    imports = IMPORTS if quick else IMPORTS | LARGE
    return {name: [PYTHON, "-c", code] for name, code in imports.items()} | {f"tasl {c}": [PROGRAM, *c.split()] for c in COMMANDS}


def start(call: list) -> int:
    "One fresh process, from nothing to its end."
    subprocess.run(call, check=True, capture_output=True)
    return 1


def races(quick: bool) -> list[Race]:
    return [Race("start", "fresh process", {name: lambda call=call: start(call) for name, call in calls(quick).items()}, "starts")]


def processor_seconds(call: list, times: int = 3) -> float:
    "User and system time of the least demanding of some fresh processes."
    def children(): return os.times().children_user + os.times().children_system
    found = []
    for _ in range(times):
        before = children()
        start(call)
        found.append(children() - before)
    return min(found)


def heaviest(code: str, most: int = 8) -> dict:
    "The imports that take longest, what they import themselves counted: name -> milliseconds."
    told = subprocess.run([PYTHON, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True).stderr
    found = re.findall(r"import time:\s*\d+ \|\s*(\d+) \|\s*(\S+)", told)
    return {name: int(micro) / 1000 for micro, name in sorted(found, key=lambda f: -int(f[0]))[:most]}


def extra(quick: bool) -> dict:
    "Processor seconds of each start, and what the imports of the command line and of the large libraries consist of."
    codes = ["import tasl_lab.cli"] if quick else ["import tasl_lab.cli", *LARGE]
    return {"processor seconds": {name: processor_seconds(call) for name, call in calls(quick).items()},
            "heaviest imports, milliseconds": {code: heaviest(code) for code in codes}}
