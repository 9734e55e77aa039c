"""The ground floor: seeds and fingerprints that are equal in every process, files that are whole or absent."""
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tasl_lab import core
from tasl_lab.core import InputError, fingerprint, pick_device, pick_precision, read_json, require, rng, seed_of, torch_rng, write_atomic, write_json

THINGS = """[np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([.5, np.nan], np.float32), "text", 3, .25, None, True,
             {"b": [1, 2], "a": {"c": np.zeros((0, 5), np.float32)}}, np.array(["x", 1], object),
             pd.DataFrame({"patient": ["p1", "p2"], "f": [.1, np.nan]})]"""


def elsewhere(code: str, **env) -> str:
    "What `code` prints in a fresh interpreter."
    code = f"import numpy as np, pandas as pd\nfrom tasl_lab.core import *\n{code}"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------- seeds ----------

def test_seed_is_the_published_value():
    assert seed_of("views", 0, 1) == 163300899028075362 and seed_of() == 5911644737314724887  # literal: a change voids every stored run
    assert 0 <= seed_of("anything") < 2**63


def test_seeds_differ_by_every_part_of_the_name():
    names = [("a",), ("a", 0), ("a", 1), (0, "a"), ("a", "0"), (("a", 0),), ("b", 0)]
    assert len({seed_of(*n) for n in names}) == len(names)


def test_numpy_numbers_name_the_same_stream():
    assert seed_of("budget", np.int64(3), (np.int32(1),)) == seed_of("budget", 3, (1,)) and seed_of(np.float64(.5)) == seed_of(.5)


def test_torch_stream_leaves_the_global_one_alone():
    import torch
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    torch_rng("a")
    assert torch.equal(before, torch.random.get_rng_state()) and torch_rng("a").device.type == "cpu"


# ---------- fingerprints ----------

@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_streams_and_fingerprints_are_equal_in_another_process(hash_seed):
    code = f"print(seed_of('a', 1), rng('a', 1).integers(10**9), torch_rng('a', 1).initial_seed(), fingerprint(*{THINGS}))"
    here = f"{seed_of('a', 1)} {rng('a', 1).integers(10**9)} {torch_rng('a', 1).initial_seed()} {fingerprint(*eval(THINGS))}"
    assert elsewhere(code, PYTHONHASHSEED=hash_seed) == here


def test_fingerprint_is_the_published_value():
    assert fingerprint(np.arange(6, dtype=np.uint8), "text", 3, {"a": [1.5, None]})[:16] == "bbfe421c5cdaab46"


@pytest.mark.parametrize("a, b", [
    (np.zeros(4, np.uint8), np.zeros(4, np.int8)), (np.zeros(4), np.zeros((2, 2))), (1, 1.), (1, "1"), (1, True), ([1, [2]], [[1], 2]), ({"a": 1}, {"a": 2}),
    ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}), ([], {}), (np.array([0., 1.]), np.array([1., 0.])),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
])
def test_fingerprint_tells_apart(a, b):
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize("a, b", [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (np.int64(3), 3), ([np.float64(.5), np.str_("a"), np.bool_(True)], [.5, "a", True]),
    ((1, 2), [1, 2]), (np.zeros((3, 4)).T, np.zeros((4, 3))),
    (pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [1, 2]}, index=[7, 8])),
])
def test_fingerprint_sees_contents_alone(a, b):
    assert fingerprint(a) == fingerprint(b)


def test_fingerprint_refuses_what_has_no_stable_text(tmp_path):
    import torch
    for x in ({"a", "b"}, object(), torch.zeros(2000), tmp_path):
        with pytest.raises(TypeError, match=type(x).__name__): fingerprint({"a": [x]})


# ---------- files ----------

@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "data"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = write_atomic(tmp_path / "a.txt", "old")

    def fail(*a): raise OSError("disk full")
    if where != "data": monkeypatch.setattr(core.os, where.removeprefix("os."), fail)
    with pytest.raises((OSError, TypeError, AttributeError)): write_atomic(path, "new" if where != "data" else 3)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*a): raise KeyboardInterrupt
    monkeypatch.setattr(core.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt): write_atomic(tmp_path / "a.txt", b"new")
    assert list(tmp_path.iterdir()) == []


def test_write_makes_folders_and_replaces(tmp_path):
    path = write_atomic(str(tmp_path / "a" / "b" / "c.bin"), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and write_atomic(path, "é").read_bytes() == "é".encode()
    if os.name == "posix": assert path.stat().st_mode & 0o777 == 0o644


def test_failed_json_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    loop = []
    loop.append(loop)
    with pytest.raises((ValueError, RecursionError)): write_json(path, loop)
    assert read_json(path) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_json_is_plain_and_sorted(tmp_path):
    given = {"b": np.arange(2), "a": [np.float32(.5), np.nan, -np.inf], "c": {"d": np.bool_(True), 3: (1, 2)}, "e": tmp_path}
    path = write_json(tmp_path / "a.json", given)
    assert read_json(path) == {"a": [.5, None, None], "b": [0, 1], "c": {"3": [1, 2], "d": True}, "e": str(tmp_path)}
    assert list(json.loads(path.read_text())) == ["a", "b", "c", "e"]


@pytest.mark.parametrize("contents", [None, b"", b"{", b"\xff\xfe{}"])
def test_unreadable_json_is_named(tmp_path, contents):
    path = tmp_path / "a.json"
    if contents is not None: path.write_bytes(contents)
    with pytest.raises(InputError, match="a.json"): read_json(path)


def test_json_is_utf8_whatever_the_locale(tmp_path):
    write_atomic(tmp_path / "a.json", '{"name": "Zürich"}')
    code = f"print(ascii(read_json({str(tmp_path / 'a.json')!r})['name']))"
    assert elsewhere(code, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C") == r"'Z\xfcrich'"


# ---------- one error, one device ----------

def test_message_is_made_only_when_needed():
    require(True, lambda: 1 / 0)
    with pytest.raises(InputError, match="picture 7"): require(False, lambda: "picture 7 is wrong")
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("name", ["warp9", "cuda:99", "cpu:x", ""])
def test_unknown_device(name):
    with pytest.raises(InputError, match="device"): pick_device(name)


def test_device_number_is_counted(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1 and pick_device("cuda").type == "cuda"
    with pytest.raises(InputError, match="'cuda:2'.* 2 "): pick_device("cuda:2")


def test_precision():
    assert pick_device("cpu").type == "cpu" and pick_precision("bf16") == "bf16" and pick_precision("auto", pick_device("cpu")) in ("bf16", "fp32")
    with pytest.raises(InputError, match="fp16"): pick_precision("fp16")


def test_library_imports_without_torch():
    assert elsewhere("import sys, tasl_lab.core; print('torch' in sys.modules)") == "False"
