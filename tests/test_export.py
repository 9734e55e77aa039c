"""Export: what leaves computes what stayed, in a Python that has no TASL Lab; what fits nowhere is refused with what does."""
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_cli import call, refused

from tasl_lab.batch.export import TARGETS, export_run
from tasl_lab.core import InputError, write_json
from tasl_lab.encoders import make_encoder
from tasl_lab.training import _write_weights

# Each example in turn, with TASL Lab out of reach: prints how far the features are apart, and which libraries were needed.
ALONE = """
import contextlib, io, json, runpy, sys
sys.modules["tasl_lab"] = None
said = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("encoder", None)
    with contextlib.redirect_stdout(io.StringIO()) as out: runpy.run_path(folder + "/example.py")
    said[folder] = json.loads(out.getvalue())
    del sys.path[0]
print(json.dumps({"said": said, "needed": [m for m in ("monai", "timm", "numpy", "pandas") if m in sys.modules]}))
"""
NETWORK = """
import importlib, json, pydoc, sys, torch
sys.modules["tasl_lab"] = None
sys.path.insert(0, sys.argv[1])
plan = json.load(open(sys.argv[2]))["configurations"]["tasl_2d"]
named = plan["architecture"]
if importlib.util.find_spec("nnunetv2"):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    net = get_network_from_plans(named["network_class_name"], named["arch_kwargs"], named["_kw_requires_import"], 1, 3, True, True)
else: net = pydoc.locate(named["network_class_name"])(input_channels=1, num_classes=3, **named["arch_kwargs"], deep_supervision=True)
from encoder import features
from safetensors.torch import load_file
expected = load_file(sys.argv[1] + "/expected.safetensors")
x = torch.rand(2, 1, *plan["patch_size"])
several = [list(o.shape) for o in net(x)]
net.decoder.deep_supervision = False
with torch.no_grad(): apart = (features(net.encoder.eval(), expected["pictures"]) - expected["features"]).abs().max().item()
print(json.dumps({"several": several, "one": list(net(x).shape), "apart": apart}))
"""


def finished(folder, name, dims=2, channels=1):
    "A run folder whose encoder has no weight that is still zero or one."
    encoder = make_encoder(name, channels, dims, **({"size": 32} if "vit" in name else {}))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters(): p.add_(torch.randn(p.shape, generator=g) * (.1 if p.ndim == 1 or len(p) == 1 else .01))
    _write_weights(encoder, folder / "encoder.safetensors", {"encoder": json.dumps({"name": name, "channels": channels, "dims": dims, "size": 32})})
    write_json(folder / "run.json", {"id": "0123", "config": {"objective": "simclr"}, "data": {"name": "waves", "sha256": "0" * 64}})
    return folder


def run(code, *args): return json.loads(subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True).stdout)


ENCODERS = [("cnn-tiny", 2, 1), ("cnn-tiny", 3, 2), ("vit-tiny", 2, 3), ("vit-tiny", 3, 1)]


def exports(tmp_path, to, encoders):
    "One export per encoder, in folders of their own."
    return [export_run(finished(tmp_path / f"{n}{d}{c}", n, d, c), to, tmp_path / f"{to}-{n}{d}{c}")["folder"] for n, d, c in encoders]


def test_torch_needs_nothing_of_ours(tmp_path):
    told = run(ALONE, *exports(tmp_path, "torch", ENCODERS))
    assert len(told["said"]) == 4 and all(s["largest_difference"] < 1e-5 for s in told["said"].values()), told
    assert not {"monai", "timm", "pandas"} & set(told["needed"])


@pytest.mark.slow
def test_other_libraries_compute_the_same(tmp_path):
    folders = exports(tmp_path, "monai", ENCODERS) + (exports(tmp_path, "timm", ENCODERS[2:3]) if find_spec("timm") else [])
    told = run(ALONE, *folders)
    assert set(told["said"]) == set(folders) and all(s["largest_difference"] < 1e-5 for s in told["said"].values()), told


def test_nnunet_builds_a_network_with_our_weights(tmp_path):
    folder, plans = exports(tmp_path, "nnunet", ENCODERS[:1])[0], tmp_path / "nnUNetPlans.json"
    write_json(plans, {"plans_name": "nnUNetPlans", "configurations": {"2d": {"patch_size": [30, 48]}}})
    subprocess.run([sys.executable, f"{folder}/encoder.py", str(plans), "2d"], check=True, capture_output=True)
    told = run(NETWORK, folder, plans)
    assert told["several"] == [[2, 3, 32, 48], [2, 3, 16, 24], [2, 3, 8, 12], [2, 3, 4, 6]] and told["one"] == [2, 3, 32, 48] and told["apart"] < 1e-5


def test_lost_weights_are_noticed(tmp_path):
    "The example is no ornament: with other weights it fails."
    a, b = exports(tmp_path, "torch", ENCODERS[:1])[0], finished(tmp_path / "other", "cnn-tiny")
    weights = make_encoder("cnn-tiny", seed=5)
    from safetensors.torch import save_file

    from tasl_lab.batch.export import plain_weights
    save_file(plain_weights(weights), f"{a}/encoder.safetensors")
    failed = subprocess.run([sys.executable, f"{a}/example.py"], capture_output=True, text=True)
    assert failed.returncode != 0 and "features differ" in failed.stderr and b.is_dir()


@pytest.mark.parametrize("name, dims, to, instead", [("cnn-tiny", 2, "timm", "torch or monai or nnunet"), ("vit-tiny", 2, "nnunet", "torch or monai or timm"),
                                                     ("vit-tiny", 3, "timm", "torch or monai"), ("cnn-tiny", 2, "keras", ", ".join(TARGETS))])
def test_what_fits_nowhere_is_refused(tmp_path, name, dims, to, instead):
    with pytest.raises(InputError, match=instead): export_run(finished(tmp_path / "run", name, dims), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path):
    told = json.loads(call("export", finished(tmp_path / "run", "cnn-tiny"), "--out", tmp_path / "out", "--json").stdout)
    assert told["to"] == "torch" and told["parameters"] > 1e5 and (tmp_path / "out" / "encoder.py").is_file()
    refused("export", tmp_path / "run", "--to", "timm", says="--to torch")
    refused("export", tmp_path / "nothing", says="no such file")


# ---------- features and scores ----------

PICTURES = ["--data", "phantom", "--size", "32", "--pictures", "60"]


def test_features_leave_as_a_table(tmp_path):
    import numpy as np
    import pandas as pd
    from safetensors.torch import load_file

    from tasl_lab.data.sources import load
    from tasl_lab.tasks.features import extract
    run = finished(tmp_path / "run", "cnn-tiny")
    told = json.loads(call("embed", run, *PICTURES, "--split", "test", "--out", tmp_path / "f.parquet", "--json").stdout)
    table, data = pd.read_parquet(tmp_path / "f.parquet"), load("phantom", 32, n=60)
    encoder = make_encoder("cnn-tiny")
    encoder.load_state_dict(load_file(run / "encoder.safetensors"))
    expected = extract(encoder, data, data.ids("test"), "cpu").pooled
    assert np.array_equal(table.filter(regex=r"^f\d+$").to_numpy("float32"), expected) and told["pictures"] == len(table) == len(data.ids("test"))
    assert {"id", "patient", "split", "label:class"} <= set(table) and told["features"] == expected.shape[1]
    assert call("embed", run, *PICTURES, "--out", tmp_path / "f.npz").exit_code == 0
    with np.load(tmp_path / "f.npz", allow_pickle=False) as f: assert f["features"].shape == (60, expected.shape[1]) and len(f["patient"]) == 60
    refused("embed", run, *PICTURES, "--out", tmp_path / "f.csv", says=".parquet or .npz")
    refused("embed", tmp_path, *PICTURES, says="holds no finished run")
    refused("embed", finished(tmp_path / "3d", "cnn-tiny", 3), *PICTURES, says="3-D")


@pytest.mark.parametrize("how", ["probe", "finetune"])
def test_a_score_comes_with_that_of_the_untrained_encoder(tmp_path, how):
    "The control is computed, not assumed: an encoder that never moved gains exactly nothing."
    run = finished(tmp_path / "run", "cnn-tiny")
    more = ["--task", "classification:class", "--labels", "24", "--how", how, "--steps", "3", "--out", tmp_path / "scores", "--json"]
    told = json.loads(call("evaluate", run, *PICTURES, *more).stdout)
    assert told["how"] == how and told["metric"] == "auroc" and told["gain"]["value"] == pytest.approx(told["trained"]["value"] - told["untrained"]["value"])
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {f"{k}-s0.{e}" for k in ("trained", "untrained") for e in ("npz", "json")} | {"evaluation.json"}
    _write_weights(make_encoder("cnn-tiny"), run / "encoder.safetensors", {"encoder": json.dumps({"name": "cnn-tiny", "channels": 1, "dims": 2, "size": 32})})
    assert json.loads(call("evaluate", run, *PICTURES, *more).stdout)["gain"]["value"] == 0


def test_what_cannot_be_scored_is_refused(tmp_path):
    run = finished(tmp_path / "run", "cnn-tiny")
    refused("evaluate", run, *PICTURES, "--how", "guess", says="use probe or finetune")
    refused("evaluate", run, *PICTURES, "--task", "segmentation:moon", says="moon")
    refused("evaluate", tmp_path / "nothing", *PICTURES, says="holds no finished run")
