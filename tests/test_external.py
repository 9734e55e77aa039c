"""Encoders from elsewhere: the same contract, weights that are read and never run, and rows of the matrix."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tasl_lab.core import InputError
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import External, Spec, external, make_encoder, pinned, read_state, renamed, sha256_of
from tasl_lab.objectives.cards import CARDS

timm = pytest.importorskip("timm", reason="needs the extra 'timm'")

SMALL = ("test_vit", "test_vit2", "test_resnet", "test_convnext", "test_efficientnet")  # class token; registers without one; convolutions of strides 2 and 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Weights of chance of some small networks of timm, each as its authors would publish them, with a classifier."
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("weights")
    for name in ("test_vit", "test_resnet"): save_file(timm.create_model(name, num_classes=5).state_dict(), place / f"{name}.safetensors")
    return place


# --- the contract ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", SMALL)
def test_the_contract_holds_at_any_size(name, channels):
    e = make_encoder(f"timm:{name}", channels, seed=1).eval()
    assert isinstance(e, External) and e.in_channels == channels and len(e.channels) == len(e.strides) == len(e.kept)
    for size in ((64, 64), (50, 90), (17, 33)):
        with torch.no_grad(): f = e(torch.rand(2, channels, *size))
        assert f.pooled.shape == (2, e.width) and f.pooled.dtype == torch.float32 and bool(f.pooled.isfinite().all())
        assert [m.shape[1] for m in f.maps] == e.channels
        unit = max(e.body.strides)
        assert [m.shape[2:] for m in f.maps] == [tuple(-(-n // unit) * unit // s for n in size) for s in e.strides]
    again = make_encoder(f"timm:{name}", channels, seed=1).state_dict()
    assert (f.cls is not None) == (name == "test_vit") and all(torch.equal(again[k], v) for k, v in e.state_dict().items())


def test_features_are_those_of_timm(files):
    e = make_encoder(f"timm:test_resnet@{files}/test_resnet.safetensors", 3).eval()
    net = timm.create_model("test_resnet", num_classes=5, features_only=False).eval()
    net.load_state_dict(read_state(files / "test_resnet.safetensors"))
    x, cfg = torch.rand(2, 3, 64, 64), net.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad(): f, want = e(x), net.forward_intermediates((x - mean) / std, intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(f.maps, want))
    assert torch.allclose(f.pooled, torch.cat([m.mean((2, 3)) for m in want], 1), atol=1e-5)


def test_maps_lie_where_the_picture_is():
    "What is bright at the left is told from what is bright at the right by the left and right half of every map, also where pictures were enlarged."
    for name in ("timm:test_resnet", "timm:test_vit?scale=4"):
        e = make_encoder(name).eval()
        x = torch.full((2, 1, 56, 56), .5)
        x[1, :, :28, :] = 1.
        with torch.no_grad(): maps = e(x).maps
        for m in (maps[0], maps[1]):
            half, d = m.shape[2] // 2, (m[1] - m[0]).abs().mean((0, 2))
            assert d[:half].mean() > d[half:].mean()


def test_hidden_pixels_do_not_matter():
    e = make_encoder("timm:test_vit?scale=2").eval()
    x, hide = torch.rand(2, 1, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
    hide[:, 1:3] = True
    other = x.clone()
    other[:, :, 8:24] = torch.rand(2, 1, 16, 32)
    with torch.no_grad(): assert torch.equal(e(x, hide, "token").pooled, e(other, hide, "token").pooled)
    for mode in ("visible", "sparse"):
        with pytest.raises(InputError, match="whole, token"): e(x, hide, mode)


@pytest.mark.parametrize("name, dims", [("SegResNet?init_filters=8", 2), ("SegResNet?init_filters=8", 3), ("UNet?channels=(8,16,32)&strides=(2,2)", 3),
                                        pytest.param("resnet10", 3, marks=pytest.mark.slow), pytest.param("DenseNet121", 2, marks=pytest.mark.slow),
                                        pytest.param("SwinUNETR?feature_size=12", 3, marks=pytest.mark.slow), ("BasicUNet", 2)])
def test_networks_of_monai_become_coarser_step_by_step(name, dims):
    e = make_encoder(f"monai:{name}", 1, dims).eval()
    unit = max(e.strides)
    assert len(e.strides) > 1 and e.strides == sorted(set(e.strides))
    with torch.no_grad(): f = e(torch.rand(1, 1, *[2 * unit] * dims))
    assert [tuple(m.shape[1:]) for m in f.maps] == [(c, *[2 * unit // s] * dims) for c, s in zip(e.channels, e.strides)] and f.pooled.shape == (1, e.width)


VIT = "img_size={}&patch_size={}&hidden_size=24&mlp_dim=48&num_layers=4&num_heads=3"


@pytest.mark.parametrize("name, dims", [
    (f"ViT?{VIT.format(32, 8)}", 2), (f"ViT?{VIT.format('(16,32,16)', '(8,8,4)')}&classification=True", 3), (f"MaskedAutoEncoderViT?{VIT.format(32, 8)}"
     "&decoder_hidden_size=24&decoder_num_heads=3&decoder_num_layers=1", 2), (f"ViTAutoEnc?{VIT.format(32, 16)}", 3),
    ("UNETR?img_size=32&feature_size=4&hidden_size=24&mlp_dim=48&num_heads=3", 2)], ids=lambda v: str(v).partition("?")[0])
def test_vision_transformers_of_monai(name, dims, tmp_path):
    "The tokens are those of the network's own pass, its encoder alone is enough of a file, and any size is brought to its own."
    e = make_encoder(f"monai:{name}", 1, dims, seed=1).eval()
    vit, x = getattr(e.body.net, "vit", e.body.net), torch.rand(2, 1, *e.body.fixed)
    kept = []
    (vit.norm if hasattr(vit, "norm") else vit.blocks).register_forward_hook(lambda m, args, out: kept.append(out))
    if hasattr(vit, "_masking"):  # its own pass, with nothing hidden
        vit._masking = lambda x, masking_ratio=None: (x, torch.arange(x.shape[1]).expand(len(x), -1), torch.zeros(x.shape[:2], dtype=torch.int))
    with torch.no_grad():
        vit(x)
        want, f = kept[0], e(x)
    front = want.shape[1] - f.tokens.shape[1]
    assert front == (f.cls is not None) and torch.allclose(f.tokens, want[:, front:], atol=1e-5)
    assert f.pooled.shape == (2, e.width) and len(f.maps) == len(e.channels) == 4 and all(m.shape[2:] == e.body.grid for m in f.maps)
    with torch.no_grad(): assert e(torch.rand(1, 1, *[20] * dims)).maps[0].shape[2:] == e.body.grid
    save_file({f"module.{k}": v.contiguous() for k, v in e.body.net.state_dict().items() if k in e.body.needed}, tmp_path / "w.safetensors")
    back = make_encoder(f"monai:{name}@{tmp_path}/w.safetensors", 1, dims, seed=2).eval()
    with torch.no_grad(): assert torch.equal(back(x).pooled, f.pooled)


def test_a_transformer_of_one_size_says_which_is_missing():
    with pytest.raises(InputError, match="img_size.*arguments as options"): make_encoder("monai:ViT?patch_size=8")


def test_every_picture_on_one_scale():
    e = make_encoder("monai:SegResNet?init_filters=8&norm=picture").eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad(): assert torch.allclose(e(x).pooled, e(x * .3 + .2).pooled, atol=1e-3)


# --- weights ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}, "student": {}},
    lambda s: {f"encoder.{k}": v for k, v in s.items()} | {"decoder.mask": torch.zeros(2)},
    lambda s: {"model": {f"net.{k}": v for k, v in s.items()} | {"queue": torch.zeros(3)}, "step": torch.tensor(1)},
])
def test_weights_are_found_where_others_put_them(tmp_path, files, wrap):
    want = read_state(files / "test_resnet.safetensors")
    torch.save(wrap(want), tmp_path / "w.pth")
    e = external("timm:test_resnet", weights=tmp_path / "w.pth")
    got = e.body.net.state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items() if k in got) and len(got) > 10


def test_files_of_the_authors_are_translated(tmp_path, files):
    "Positions of another picture size, as for DINOv2, which was trained at 518 pixels."
    state = read_state(files / "test_vit.safetensors")
    other = timm.create_model("test_vit", img_size=96)
    torch.save(other.state_dict(), tmp_path / "small.pth")
    e = make_encoder(f"timm:test_vit@{tmp_path}/small.pth")
    assert e.body.net.pos_embed.shape == state["pos_embed"].shape != other.pos_embed.shape
    assert torch.equal(e.body.net.blocks[3].attn.qkv.weight, other.blocks[3].attn.qkv.weight)


def test_a_file_is_never_run(tmp_path):
    class Program:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "was run"),))

    torch.save({"state_dict": {"a": Program()}}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"\x80\x04.")
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 64)
    torch.save([1, 2], tmp_path / "d.pth")
    torch.save({"epoch": 1}, tmp_path / "e.pth")
    for name in ("a.pth", "b.pth", "c.safetensors", "d.pth", "e.pth"):
        with pytest.raises(InputError, match=name): make_encoder(f"timm:test_resnet@{tmp_path / name}")
    assert not (tmp_path / "was run").exists()


def test_another_networks_file_is_refused(files, tmp_path):
    with pytest.raises(InputError, match="another network"): make_encoder(f"timm:test_vit@{files}/test_resnet.safetensors")
    state = read_state(files / "test_resnet.safetensors")
    part = {k: v for k, v in state.items() if "layer4" not in k}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="lacks .*layer4"): make_encoder(f"timm:test_resnet@{tmp_path}/part.safetensors")
    k = next(k for k in state if k.startswith("layer2") and state[k].ndim == 4)
    save_file(state | {k: torch.zeros(1, 2, 3, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="there, .* here"): make_encoder(f"timm:test_resnet@{tmp_path}/odd.safetensors")


def test_the_longest_fit_of_names_wins():
    state = {"student.backbone.a.w": 1, "student.backbone.b.w": 2, "teacher.a.w": 3}
    assert renamed(state, ["a.w", "b.w"]) == {"a.w": 1, "b.w": 2}
    assert renamed({"a.w": 1, "b.w": 2}, ["encoder.a.w", "encoder.b.w", "head.w"]) == {"encoder.a.w": 1, "encoder.b.w": 2}


def test_a_folder_of_weights_keeps_paths_out_of_records(files, monkeypatch):
    monkeypatch.setenv("TASL_WEIGHTS", str(files))
    e = make_encoder("timm:test_resnet@test_resnet.safetensors")
    assert e.name == "timm:test_resnet@test_resnet.safetensors" == str(Spec.of(f"timm:test_resnet@{files}/test_resnet.safetensors#abc"))


def test_a_name_may_be_bound_to_contents(files, tmp_path):
    name = pinned(f"timm:test_resnet?grey=average@{files}/test_resnet.safetensors")
    assert name.endswith("#" + sha256_of(files / "test_resnet.safetensors")[:12]) and pinned(name) == name and pinned("cnn-tiny") == "cnn-tiny"
    make_encoder(name)
    with pytest.raises(InputError, match="the file was changed"): make_encoder(name.partition("#")[0] + "#000000000000")


def test_published_weights_without_a_network(monkeypatch):
    real = timm.create_model

    def away(name, pretrained=False, **options):
        if pretrained: raise OSError("no route to host")
        return real(name, **options)
    monkeypatch.setattr(timm, "create_model", away)
    for make in (lambda: make_encoder("timm:test_resnet@pretrained"), lambda: make_encoder("timm:test_resnet", weights=True)):
        with pytest.raises(InputError, match="could not be fetched .*timm:test_resnet@FILE"): make()


@pytest.mark.parametrize("name, said", [
    ("timm:vit_small_patch61_224", "did you mean vit_small"), ("timm:test_resnet?scale=0", "scale"), ("timm:test_resnet?norm=batch", "own, picture or none"),
    ("timm:test_resnet?grey=red", "repeat or average"), ("timm:test_resnet?depht=3", "options"), ("timm:test_resnet?scale", "value"),
    ("hub:dinov2", "timm, monai, bundle"), ("monai:SegResnet", "did you mean SegResNet"), ("monai:UNet", "arguments as options"),
    ("monai:SegResNet@pretrained", "@FILE"), ("bundle:none", "no bundle"),
    ("timm:test_resnet@none.pth", r"\$TASL_WEIGHTS"), ("cnn-huge@w.pt", "cnn-tiny"), ("resnet18", "timm:NAME"),
])
def test_what_cannot_be_made_says_so(name, said):
    with pytest.raises(InputError, match=said): make_encoder(name)


def test_volumes_are_no_pictures():
    with pytest.raises(InputError, match="not volumes"): make_encoder("timm:test_resnet", dims=3)


def bundle(folder, network, state=None):
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(network))
    if state is not None: torch.save({"model": state}, folder / "models" / "model.pt")
    return folder


def test_a_bundle_is_read_and_not_run(tmp_path, monkeypatch):
    made = {"_target_": "SegResNet", "spatial_dims": "@d", "init_filters": 8, "in_channels": 2, "out_channels": "@classes"}
    want = make_encoder("monai:SegResNet?init_filters=8&in_channels=2&out_channels=3", 2, 3, seed=3)
    good = bundle(tmp_path / "good", {"d": 3, "classes": 3, "network_def": made}, want.body.net.state_dict())
    got = make_encoder(f"bundle:{good}", 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values())) and got.colours == 2
    with torch.no_grad(): assert got.eval()(torch.rand(1, 1, 16, 16, 16)).pooled.shape == (1, got.width)
    with pytest.raises(InputError, match="3-D, the pictures are 2-D"): make_encoder(f"bundle:{good}", 1, 2)
    run = f"$__import__('os').mkdir('{tmp_path / 'was run'}')"
    wrong = ({"_target_": "os.system", "command": "id"}, made | {"init_filters": run}, {"_target_": run}, made | {"init_filters": "@none"}, {})
    for k, bad in enumerate(wrong):
        with pytest.raises(InputError): make_encoder(f"bundle:{bundle(tmp_path / str(k), {'network_def': bad}, {})}", 1, 3)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("name", ["cnn-tiny", "vit-tiny"])
def test_our_own_go_on_from_a_file(tmp_path, name):
    size = {"size": 32} if name == "vit-tiny" else {}
    mine = make_encoder(name, seed=4, **size)
    save_file({k: v.contiguous() for k, v in mine.state_dict().items()}, tmp_path / "encoder.safetensors")
    back = make_encoder(f"{name}@{tmp_path}/encoder.safetensors", **size)
    assert back.name == name and all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), mine.state_dict().values()))
    with pytest.raises(InputError): make_encoder(f"cnn-small@{tmp_path}/encoder.safetensors")


# --- training on, and the matrix -------------------------------------------------------------------------------------------------------

def test_a_training_begins_from_the_file_and_is_read_back(tmp_path, files):
    from tasl_lab.config import PretrainConfig
    from tasl_lab.training import load_encoder, pretrain
    data = phantom(24, 32)
    name = f"timm:test_resnet@{files}/test_resnet.safetensors"
    config = PretrainConfig.of(objective="simclr", encoder=name, steps=2, batch=4, lr=1e-9, precision="fp32", watch=0)
    states = list(pretrain(config, data, tmp_path / "run"))
    start, end = read_state(files / "test_resnet.safetensors"), load_encoder(tmp_path / "run").body.net.state_dict()
    assert len(states) == 2 and all(np.isfinite(s.loss) for s in states)
    assert torch.allclose(end["layer2.0.conv1.weight"], start["layer2.0.conv1.weight"], atol=1e-5)  # at such a rate it has not moved from there


@pytest.mark.slow
@pytest.mark.parametrize("name, dims", [("timm:test_resnet", 2), ("timm:test_vit?scale=2", 2), ("monai:SegResNet?init_filters=8", 3)])
def test_which_objectives_can_go_on(name, dims):
    from small import SIZES, small_set

    from tasl_lab.alignment.external import can_continue
    SIZES.setdefault(dims, (32,) * dims)
    data = phantom(24, 32, preset="lesion-grade") if dims == 2 else small_set(3)
    says = can_continue(name, data)
    assert set(says) == set(CARDS) and says["mae"] and says["spark"]
    inside = {n for n in CARDS if n in ("mae", "spark")}
    if dims == 2: assert not {n: s for n, s in says.items() if s and n not in inside and not {"ViT"} == set(CARDS[n].encoders) and "position" not in s}


@pytest.mark.slow
def test_rows_of_others_in_a_matrix(tmp_path, files, monkeypatch):
    from tasl_lab.alignment.external import run_external
    from tasl_lab.alignment.matrix import MatrixConfig, Results, as_json, cells_table, run_matrix
    monkeypatch.setenv("TASL_WEIGHTS", str(files))
    data = phantom(60, 32, preset="lesion-grade")
    tasks = ["segmentation:tissue"]
    config = MatrixConfig(objectives=["simclr"], tasks=tasks, labels=[20], seeds=2, draws=1, again=False, ceiling=False, steps=2, batch=8,
                          finetune_steps=2, finetune=True)
    weights = {"imagenet-supervised": "timm:test_resnet@test_resnet.safetensors"}
    with pytest.raises(InputError, match="run_matrix first"): run_external(config, data, tmp_path, weights, verbose=False)
    run_matrix(config, data, tmp_path, verbose=False)
    folder = run_external(config, data, tmp_path, weights, ["simclr"], verbose=False)
    results = Results(folder)
    table = cells_table(results)
    arms = {"external:imagenet-supervised", "external:imagenet-supervised, fine-tuned", "simclr from external:imagenet-supervised"}
    assert arms < set(table.arm) and not results.unfinished
    mine = table[table.arm.isin(arms)]
    assert len(mine) == 3 and mine[["mean", "low", "high", "vs_random", "vs_supervised"]].notna().all(axis=None) and (mine.seeds == 2).all()
    frozen = results.scores("external:imagenet-supervised", "segmentation:tissue", 20)
    assert set(frozen) == {0, 1} and frozen[0].info["encoder"] == "timm:test_resnet@test_resnet.safetensors"
    assert json.dumps(as_json(results), default=str).count(str(files)) == 0  # no path of this machine
    assert results.arms[:2] == ["simclr", "simclr, fine-tuned"] and set(results.arms) == {*arms, "simclr", "simclr, fine-tuned", "random", "supervised"}
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("item.json")}
    run_external(config, data, tmp_path, weights, ["simclr"], verbose=False)
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("item.json")}
    other = timm.create_model("test_resnet", num_classes=5)
    before = Path(files / "test_resnet.safetensors").read_bytes()
    try:
        save_file(other.state_dict(), files / "test_resnet.safetensors")
        run_external(config, data, tmp_path, weights, verbose=False)  # other contents under the same name are other work
    finally: Path(files / "test_resnet.safetensors").write_bytes(before)
    assert len(list(folder.rglob("item.json"))) > len(stamps)


def test_rows_of_others_are_named_beforehand(files):
    from tasl_lab.alignment.external import named_weights
    spec = f"timm:test_vit?scale=2&grey=average@{files}/test_vit.safetensors#abc"
    unet = "monai:UNet?channels=(8,16,32)&strides=(2,2)"
    given = named_weights([f"dinov2={spec}", f"timm:test_resnet@pretrained,{unet}", "cnn-tiny@w.pt"])
    assert given == {"dinov2": spec, "test_resnet": "timm:test_resnet@pretrained", "UNet": unet, "cnn-tiny": "cnn-tiny@w.pt"}
    assert named_weights([]) == {} and named_weights([f"bundle:{files}/spleen"]) == {"spleen": f"bundle:{files}/spleen"}
    with pytest.raises(InputError, match="two rows .*'test_vit'"): named_weights(["timm:test_vit", "timm:test_vit?scale=2"])
    with pytest.raises(InputError, match="no name"): named_weights(["a=timm:test_vit,"])


def test_objectives_of_a_matrix_count_the_rows_of_others():
    "In the order of the configuration, then as they are found."
    from tasl_lab.alignment.matrix import MatrixConfig, Results
    found = Results.__new__(Results)
    found.config = MatrixConfig(objectives=["simclr", "masked"])
    done = ["external:b", "random", "spark", "simclr from external:b", "supervised", "simclr", "external:a", "ceiling", "external:b"]
    found.items = [{"item": {"arm": a}} for a in done]
    assert found.objectives == ["simclr", "spark", "external:b", "simclr from external:b", "external:a"] and found.arms[-2:] == ["random", "supervised"]


def asked(*args):
    "The command line, in this process."
    from typer.testing import CliRunner

    from tasl_lab.cli import app
    return CliRunner().invoke(app, ["matrix", *map(str, args)])


def test_the_command_line_refuses_rows_before_any_work(files, tmp_path, monkeypatch):
    small = lambda *a: asked("--preset", "smoke", "--out", tmp_path / "x", *a)
    assert "two rows of weights are named 'a'" in small("--external", "a=timm:test_vit,a=timm:test_resnet").stderr
    monkeypatch.setattr("tasl_lab.data.sources.load", lambda *a, **kw: phantom(24, 32))
    missing = small("--external", "timm:test_vit@none.pt")
    assert missing.exit_code == 2 and "none.pt: no such file of weights" in missing.stderr
    assert "add --folds 0" in small("--external", "timm:test_vit", "--folds", "3").stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_line_takes_rows_of_others(files, tmp_path, monkeypatch):
    from tasl_lab.alignment.matrix import PRESETS
    tiny = {"objectives": ["simclr"], "tasks": ["classification:class"], "labels": [12], "seeds": 2, "draws": 1, "steps": 2, "batch": 8, "finetune_steps": 2,
            "again": False, "ceiling": False}
    monkeypatch.setitem(PRESETS, "smoke", {"pictures": 60, "size": 32, "matrix": tiny})
    args = ["--preset", "smoke", "--width", 1, "--out", tmp_path, "--json", "--quiet"]
    rows = ["--external", f"mine=timm:test_resnet@{files}/test_resnet.safetensors", "--external", "timm:test_convnext,monai:SegResNet?init_filters=8"]
    done = asked(*args, *rows)
    assert done.exit_code == 0, done.output
    cells, base = json.loads(done.stdout)["cells"], {"simclr", "random", "supervised"}
    assert {c["arm"] for c in cells} == base | {"external:mine", "external:test_convnext", "external:SegResNet"} and str(files) not in done.stdout
    assert all(c["verdict_random"] for c in cells if c["arm"] not in ("random",))
    stored = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("item.json")}
    again = asked(*args)
    assert {c["arm"] for c in json.loads(again.stdout)["cells"]} == base, "rows that the command does not name"
    assert asked(*args, *rows).exit_code == 0 and stored == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("item.json")}
