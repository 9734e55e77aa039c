"""Nothing that we read can run: files of a stranger are data, whatever they are called and whatever is in them."""
import ast
import json
import pickle
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tasl_lab
from tasl_lab import encoders
from tasl_lab.alignment.gate import begin, take_over
from tasl_lab.batch.export import export_run
from tasl_lab.batch.runs import find_runs, last_row
from tasl_lab.config import PretrainConfig
from tasl_lab.core import InputError, read_json, write_json
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.sources import load
from tasl_lab.lab.session import encoder_at, found
from tasl_lab.tasks.scores import Scores
from tasl_lab.training import load_encoder, load_objective, pretrain

LIBRARY = Path(tasl_lab.__file__).parent


class Bomb:
    "Leaves a file where it is unpickled."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return Path.touch, (self.mark,)


def pictures():
    x = np.random.default_rng(0).integers(0, 255, (24, 1, 16, 16)).astype(np.uint8)
    return ImageSet(x, Info("blocks"), table=pd.DataFrame({"split": ["train"] * 24}))


CONFIG = dict(objective="simsiam", encoder="cnn-tiny", steps=3, batch=8, precision="fp32", watch=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A finished run, a stopped one, a set and scores, as we write them."
    top = tmp_path_factory.mktemp("whole")
    data, config = pictures(), PretrainConfig.of(**CONFIG)
    for _ in pretrain(config, data, top / "run", "cpu"): pass
    for state in pretrain(config, data, top / "stopped", "cpu", every=1):
        if state.step == 2: break
    data.save(top / "set")
    return top


def armed(kind, mark):
    "Bytes of a file with a bomb in it."
    import io
    buffer, bomb = io.BytesIO(), Bomb(mark)
    if kind == "pickle": pickle.dump(bomb, buffer)
    if kind == "torch": torch.save({"model": bomb}, buffer)
    if kind == "npz":
        with zipfile.ZipFile(buffer, "w") as z:
            for name in ("images", "groups", "ids"):
                with z.open(f"{name}.npy", "w") as f: np.lib.format.write_array(f, np.array([bomb], object), allow_pickle=True)
    return buffer.getvalue()


def resume(folder): next(pretrain(PretrainConfig.of(**CONFIG), pictures(), folder, "cpu"))


READERS = {  # file, and behind "|" which of its readers -> what reads it
    "run/encoder.safetensors": lambda top: load_encoder(top / "run", "cpu"),
    "run/objective.safetensors": lambda top: load_objective(top / "run", pictures(), "cpu"),
    "run/run.json": lambda top: load_objective(top / "run", pictures(), "cpu"),
    "stopped/checkpoint.safetensors": lambda top: resume(top / "stopped"),
    "stopped/checkpoint.safetensors|gate begins": lambda top: begin(PretrainConfig.of(**CONFIG), pictures(), 1, top / "stopped"),
    "stopped/checkpoint.safetensors|gate takes over": lambda top: take_over(top / "stopped", top / "new"),
    "stopped/checkpoint.safetensors|lab looks for runs": lambda top: found(top / "stopped"),
    "stopped/checkpoint.safetensors|lab shows the encoder": lambda top: encoder_at(top / "stopped", PretrainConfig.of(**CONFIG), pictures()),
    "run/encoder.safetensors|lab shows the encoder": lambda top: encoder_at(top / "run", PretrainConfig.of(**CONFIG), pictures()),
    "stopped/metrics.parquet": lambda top: resume(top / "stopped"),
    "stopped/metrics.parquet|lab looks for runs": lambda top: found(top / "stopped"),
    "set/arrays.npz": lambda top: load(top / "set"),
    "set/info.json": lambda top: load(top / "set"),
    "scores.npz": lambda top: Scores.load(top / "scores"),
    "weights.pt": lambda top: encoders.read_state(top / "weights.pt"),
    "weights.safetensors": lambda top: encoders.read_state(top / "weights.safetensors"),
}


@pytest.mark.parametrize("kind", ["pickle", "torch", "npz"])
@pytest.mark.parametrize("name", READERS)
def test_a_bomb_under_each_name_does_not_go_off(name, kind, whole, tmp_path):
    import shutil
    top, mark = tmp_path / "top", tmp_path / "went-off"
    shutil.copytree(whole, top)
    write_json(top / "scores.json", {"task": "t", "metric": "m", "classes": [], "info": {}})
    file = name.partition("|")[0]
    (top / file).write_bytes(armed(kind, mark))
    with pytest.raises((InputError, ValueError, KeyError)) as told: READERS[name](top)
    assert not mark.exists() and (Path(file).name in str(told.value) or file == "scores.npz")
    assert isinstance(told.value, InputError) or "|" not in name, "the gate and the Lab show one sentence and go on"
    find_runs(top)
    last_row(top / "stopped")
    assert not mark.exists()


def test_the_bomb_is_real(tmp_path):
    pickle.loads(armed("pickle", tmp_path / "mark"))
    assert (tmp_path / "mark").exists()


def test_words_of_a_record_are_no_program(whole, tmp_path):
    "A stranger's record goes into the file that an export leaves, as harmless words."
    import shutil
    shutil.copytree(whole / "run", tmp_path / "run")
    evil, mark = f'"""\nopen({str(tmp_path / "mark")!r}, "w")\n"""', tmp_path / "mark"
    record = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", record | {"id": evil, "config": record["config"] | {"objective": evil}})
    export_run(tmp_path / "run", "torch", tmp_path / "out")
    text = (tmp_path / "out" / "encoder.py").read_text()
    assert not any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "open" for n in ast.walk(ast.parse(text))) and not mark.exists()


def test_headers_are_read_as_data(whole, tmp_path):
    "An encoder's header names an encoder of ours, or nothing."
    import shutil

    from safetensors.torch import load_file, save_file
    shutil.copytree(whole / "run", tmp_path / "run")
    path = tmp_path / "run" / "encoder.safetensors"
    weights = load_file(path)
    for name in ("os.system", "__import__('os')", "../../evil"):
        save_file(weights, path, {"encoder": json.dumps({"name": name, "channels": 1, "dims": 2, "size": 16})})
        with pytest.raises(InputError, match="is unknown"): load_encoder(tmp_path / "run", "cpu")
    save_file(weights, path)
    with pytest.raises(InputError, match="not written by a run of ours"): load_encoder(tmp_path / "run", "cpu")


@pytest.mark.parametrize("header", [None, {"step": "__import__('os')"}, {"config": "{}"}])
def test_weights_that_are_no_checkpoint_of_ours_are_told(header, whole, tmp_path):
    "Harmless tensors under the name of a checkpoint: one sentence, no guess at a step."
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors", header)
    for read in (lambda: take_over(tmp_path, tmp_path / "new"), lambda: found(tmp_path)):
        with pytest.raises(InputError, match="no checkpoint of ours"): read()


# ---------- the library's own text ----------

FORBIDDEN = {("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load"), ("joblib", "load"), ("pd", "read_pickle"), ("dill", "load"),
             ("marshal", "loads"), ("shelve", "open"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch.jit", "load")}
FOREIGN = {"encoders.py"}     # weights of other projects, which come as files of `torch.save`: tensors alone are read of them
SEALED = {"batch/runner.py"}  # `eval` of a type hint whose syntax was checked against a short list, without builtins


@cache
def calls(path): return [(node, ast.unparse(node.func)) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def faults(path):
    "Calls in a module that could run what they read."
    where = path.relative_to(LIBRARY).as_posix()
    for node, name in calls(path):
        owner, _, attribute = name.rpartition(".")
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        sealed = name not in ("eval", "exec") or where in SEALED
        whole = name != "np.load" or given.get("allow_pickle", "False") == "False"
        plain = name != "yaml.load" or ("Loader" in ast.unparse(node) and "Unsafe" not in ast.unparse(node))
        tensors = name == "torch.load" and given.get("weights_only") == "True" and where in FOREIGN
        if ((owner, attribute) in FORBIDDEN and not tensors) or not (sealed and whole and plain): yield f"{where}:{node.lineno}: {name}"


def test_no_module_reads_what_could_run(tmp_path, monkeypatch):
    modules = [p for p in LIBRARY.rglob("*.py") if p.name != "_modidx.py"]
    assert len(modules) > 50 and [f for p in modules for f in faults(p)] == []
    bad = tmp_path / "bad.py"
    bad.write_text("import torch, yaml\nimport numpy as np\ntorch.load('x', weights_only=True)\nnp.load('x', allow_pickle=True)\n"
                   "yaml.load('x', yaml.UnsafeLoader)\neval('1')\n")
    monkeypatch.setitem(globals(), "LIBRARY", tmp_path)
    assert len(list(faults(bad))) == 4


DOORS = {"training.py", "batch/runs.py", *FOREIGN}  # `read_weights`; the header alone, without PyTorch; weights of other projects


def test_our_files_of_weights_are_opened_in_one_place():
    "Where the error is told in one sentence, and where safety has to be looked at."
    opened = lambda p: any(name.rpartition(".")[2] in ("safe_open", "load_file", "load_model", "deserialize") for _, name in calls(p))
    there = {p.relative_to(LIBRARY).as_posix() for p in LIBRARY.rglob("*.py") if opened(p)}
    assert "training.py" in there and there <= DOORS
