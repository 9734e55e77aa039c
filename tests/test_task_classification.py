"""Classification, its metrics and probes; features on disk; attention against masks."""
import multiprocessing
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tasl_lab.alignment.intervals import crossed_interval, pseudo_values
from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import Features, make_encoder
from tasl_lab.tasks.attention import attention_overlap, fresh_like, localisation, maps_of, pixel_curves, pointing_game, rollout
from tasl_lab.tasks.classification import GRID, tokens_of
from tasl_lab.tasks.features import FeatureBank, extract
from tasl_lab.tasks.heads import fit_logistic
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.scores import auprc, auprc_per_class, ece, kind_of


def chance(*keys): return np.random.default_rng(keys)


# ---------- metrics ----------

def probabilities(g, n, k): return g.dirichlet(np.full(k, .6), n).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_of_scikit_learn(seed):
    from sklearn.metrics import average_precision_score
    g = chance(seed)
    s, y, w = g.integers(0, 12, 90) / 11, g.random(90) < .3, g.integers(0, 4, (3, 90)).astype(float)
    assert auprc(s, y, w) == pytest.approx([average_precision_score(y, s, sample_weight=v) for v in w], abs=1e-9)
    raw = dict(prob=probabilities(g, 90, 4), y=g.integers(0, 4, 90))
    want = average_precision_score(np.eye(4)[raw["y"]], raw["prob"], average=None)
    assert auprc_per_class(raw, np.ones((1, 90)))[0] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_calibration_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g, ours = chance(seed), kind_of("classification").metrics["ece"]
    times = g.integers(0, 4, (3, 70))
    raw = dict(prob=probabilities(g, 70, 4), y=g.integers(0, 4, 70))
    raw["prob"][:5] = np.eye(4)[raw["y"][:5]]                                   # fully confident
    p, y = torch.from_numpy(raw["prob"]), torch.from_numpy(raw["y"])
    want = [functional.multiclass_calibration_error(p.repeat_interleave(r, 0), y.repeat_interleave(r), 4) for r in torch.from_numpy(times)]
    assert ours.lower and ours.value(raw, times.astype(float), "prob")[:, 0] == pytest.approx(np.array(want), abs=1e-6)
    raw = dict(prob=g.random((70, 3), dtype=np.float32), y=g.integers(0, 2, (70, 3)).astype(np.uint8))
    column = lambda k, c, r: torch.from_numpy(raw[k][:, c]).repeat_interleave(torch.from_numpy(r))
    want = [[functional.binary_calibration_error(column("prob", c, r), column("y", c, r).long()) for c in range(3)] for r in times]
    assert ours.value(raw, times.astype(float), "prob") == pytest.approx(np.array(want), abs=1e-6)


def test_undefined_metrics():
    raw = dict(prob=np.array([[.8, .2], [.6, .4]]), y=np.array([0, 0]))
    assert np.isnan(auprc_per_class(raw, np.ones((1, 2)))).tolist() == [[False, True]]
    assert np.isnan(ece(raw, np.zeros((1, 2)))).all()


# ---------- linear probe ----------

@pytest.mark.parametrize("rows, features, several", [(12, 40, False), (30, 64, True), (60, 61, False), (60, 20, False), (5, 400, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_of_few_rows(rows, features, several, dtype):
    "Fewer rows than features: the minimum of the same function, in the span of the rows."
    from sklearn.linear_model import LogisticRegression
    g = chance(rows, features)
    x = g.normal(size=(rows, features)) @ g.normal(size=(features, features)) / features ** .5
    y = g.integers(0, 2, (rows, 3)) if several else np.r_[0, 1, 2, g.integers(0, 3, rows - 3)]
    if several: y[0], y[1] = 1, 0
    tight = 1e-12 if dtype == torch.float64 else 1e-9
    path = fit_logistic(torch.from_numpy(x).to(dtype), torch.from_numpy(y), 3, GRID, tolerance=tight, steps=1000)
    for w, l2 in zip(path, GRID):
        w = w.double().numpy()
        assert w.shape == (features + 1, 3)
        for c in range(3) if several else (slice(None),):
            truth = y[:, c] if several else y
            sk = LogisticRegression(C=1 / (l2 * y.size), tol=1e-9, max_iter=20_000).fit(x, truth)
            out = x @ w[:-1, c] + w[-1, c]
            got = 1 / (1 + np.exp(-out)) if several else np.exp(out) / np.exp(out).sum(1, keepdims=True)
            assert got == pytest.approx(sk.predict_proba(x)[:, 1] if several else sk.predict_proba(x), abs=1e-3)


def test_fit_ignores_directions_without_rows():
    "A channel in which no row differs from zero gets no weight, and equal rows do no harm."
    g = chance(0)
    x = torch.from_numpy(np.repeat(g.normal(size=(6, 30)), 2, 0))
    x[:, 7] = 0
    for w in fit_logistic(x, torch.arange(12) % 3, 3, GRID): assert w.isfinite().all() and w[7].abs().max() < 1e-9


# ---------- attentive probe ----------

def marked(n=700, cells=8, channels=12, seed=0, dims=2):
    "A set whose class stands in one random cell of each feature map, and its bank; elsewhere is noise."
    g, y = chance(6, seed), chance(seed).integers(0, 2, n)
    m = g.normal(size=(n, cells ** dims, channels)).astype(np.float32)
    at = g.integers(0, cells ** dims, n)
    m[np.arange(n), at, 0] += 9
    m[np.arange(n), at, 1] += 3. * (2 * y - 1)
    table = pd.DataFrame({"split": np.repeat(["train", "val", "test"], [n // 2, n // 7, n - n // 2 - n // 7])})
    set = ImageSet(np.zeros((n, 1, *[8] * dims), np.uint8), Info("marked", classes={"what": ["a", "b"]}), labels={"what": y}, table=table)
    maps = np.moveaxis(m, 1, 2).reshape(n, channels, *[cells] * dims).astype(np.float16)
    return set, FeatureBank(set.ids(), m.mean(1), [maps], set.spatial, [0], set.sha256)


@pytest.mark.parametrize("dims, cells", [(2, 8), (3, 4)])
def test_attention_finds_what_the_mean_drowns(dims, cells):
    set, bank = marked(cells=cells, dims=dims)
    found = make_task("classification:what", set).probe(bank, set, set.budget(250)).values()
    assert found["attentive auroc"] > .9 and found["attentive balanced accuracy"] > .8
    assert found["auroc"] < .75 and found["attentive auroc"] > found["auroc"] + .2


def test_attention_of_shuffled_labels_is_chance():
    set, bank = marked()
    wrong = ImageSet(set.images, set.info, labels={"what": chance(5).permutation(set.labels["what"])}, table=set.table)
    bank.source = wrong.sha256
    found = make_task("classification:what", wrong).probe(bank, wrong, wrong.budget(250))
    assert abs(found.value(metric="attentive auroc") - .5) < .12


def test_attention_with_several_labels_and_without_validation():
    set, bank = marked()
    y = set.labels["what"]
    pair = np.stack([y, 1 - y], 1).astype(np.uint8)
    table = set.table.assign(split=set.table.split.replace("val", "train"))
    both = ImageSet(set.images, Info("pair", classes={"what": ["a", "b"]}), labels={"what": pair}, table=table)
    bank.source = both.sha256
    a, b = (make_task("classification:what", both).probe(bank, both, both.budget(300), seed=s) for s in (0, 0))
    assert a.raw["attentive_prob"].shape == (len(a.ids), 2) and np.array_equal(a.raw["attentive_prob"], b.raw["attentive_prob"])
    assert a.value(metric="attentive auroc") > .85
    c = make_task("classification:what", both).probe(bank, both, both.budget(300), seed=1)
    assert not np.array_equal(a.raw["attentive_prob"], c.raw["attentive_prob"]) and np.array_equal(a.raw["prob"], c.raw["prob"])


def test_tokens_of_one_level_and_of_many():
    ones = lambda c, *size: torch.ones(1, c, *size)
    assert tokens_of(Features(None, [ones(4, 14, 14)] * 3)).shape == (1, 196, 4)            # a ViT keeps its grid
    assert tokens_of(Features(None, [ones(2, 48, 32), ones(4, 24, 16), ones(8, 12, 8), ones(8, 6, 4)])).shape == (1, 24, 22)
    assert tokens_of(Features(None, [ones(2, 32, 32, 32), ones(4, 16, 16, 16)])).shape == (1, 4096, 6)   # nothing coarse enough
    assert tokens_of(Features(None, [ones(2, 32, 32), ones(4, 12, 12), ones(4, 6, 6)])).eq(1).all()      # sizes that do not divide


# ---------- features on disk ----------

@pytest.fixture(scope="module")
def pictures(): return phantom(60, size=32, seed=0)


def counted(encoder):
    "The encoder, and a list that grows with each of its passes."
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    return encoder, calls


def equal(a, b):
    pairs = zip([a.pooled, *a.maps], [b.pooled, *b.maps], strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype and x.strides == y.strides for x, y in pairs) and np.array_equal(a.ids, b.ids)


@pytest.mark.parametrize("name, dims", [("cnn-tiny", 2), ("vit-tiny", 2), ("cnn-tiny", 3)])
def test_cache_gives_the_same_and_encodes_once(name, dims, tmp_path):
    set = phantom(20, size=16 if dims == 3 else 32, dims=dims, seed=0)
    encoder, calls = counted(make_encoder(name, dims=dims))
    plain = extract(encoder, set, batch=8)
    calls.clear()
    first = extract(encoder, set, batch=8, cache=tmp_path / "deep" / "cache")
    assert len(calls) == 3
    second = extract(encoder, set, batch=5, cache=tmp_path / "deep" / "cache")
    assert len(calls) == 3 and equal(plain, first) and equal(first, second)
    assert all(isinstance(m, np.memmap) for m in second.maps) and not second.maps[0].flags.writeable
    assert equal(plain, extract(encoder, set, batch=8, in_memory=0)) and len(calls) == 6


def test_cached_probes_are_equal(pictures, tmp_path):
    encoder = make_encoder("cnn-tiny")
    extract(encoder, pictures, cache=tmp_path)
    banks = extract(encoder, pictures), extract(encoder, pictures, cache=tmp_path), extract(encoder, pictures, in_memory=0)
    for spec in ("classification:class", "detection:boxes"):
        a, *others = (make_task(spec, pictures).probe(b, pictures, pictures.ids("train")).raw for b in banks)
        for b in others: assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)


def test_cache_entries_never_collide(pictures, tmp_path):
    "Whatever changes the features makes an entry of its own."
    other = phantom(60, size=32, seed=1)
    slightly = make_encoder("cnn-tiny")
    with torch.no_grad(): next(slightly.parameters()).view(-1)[0] += 1e-6
    asked = [(make_encoder("cnn-tiny"), pictures, {}), (make_encoder("cnn-tiny", seed=1), pictures, {}), (slightly, pictures, {}),
             (make_encoder("cnn-tiny"), other, {}), *[(make_encoder("cnn-tiny"), pictures, how) for how in (
                 {"ids": [1, 2]}, {"ids": [2, 1]}, {"levels": [3]}, {"precision": "bf16"})],
             (make_encoder("vit-tiny", size=32), pictures, {}), (make_encoder("vit-tiny", size=32, heads=2), pictures, {})]
    for n, (encoder, set, how) in enumerate(asked, 1):
        how = {"precision": "fp32"} | how
        found = extract(encoder, set, cache=tmp_path, **how)
        assert len(list(tmp_path.iterdir())) == n and equal(found, extract(encoder, set, **how))
    assert equal(extract(make_encoder("cnn-tiny"), pictures, cache=tmp_path, precision="fp32"), extract(make_encoder("cnn-tiny"), pictures, precision="fp32"))
    assert len(list(tmp_path.iterdir())) == len(asked)


def test_half_written_cache_is_never_read(pictures, tmp_path):
    "An encoder that fails midway leaves nothing behind; a file that was cut since is made again."
    encoder, calls = counted(make_encoder("cnn-tiny"))

    def fail(*_):
        if len(calls) > 2: raise RuntimeError("power cut")
    hook = encoder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="power cut"): extract(encoder, pictures, batch=16, cache=tmp_path)
    hook.remove()
    assert not list(tmp_path.iterdir())
    whole = extract(encoder, pictures, cache=tmp_path)
    entry, = tmp_path.iterdir()
    want = np.array(whole.maps[0])
    for damage in (lambda: (entry / "1.npy").write_bytes((entry / "1.npy").read_bytes()[:5000]), (entry / "0.npy").unlink, (entry / "orders.json").unlink):
        damage()
        calls.clear()
        assert np.array_equal(extract(encoder, pictures, cache=tmp_path).maps[0], want) and len(calls) == 1


def test_full_disk_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="has 0.0 GB left: choose another cache folder"): extract(make_encoder("cnn-tiny"), pictures, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def _extract_apart(folder, _): return float(extract(make_encoder("cnn-tiny"), phantom(20, size=32, seed=0), device="cpu", cache=folder).pooled.sum())


@pytest.mark.slow
def test_two_processes_fill_one_entry(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool: a, b = pool.map(partial(_extract_apart, tmp_path), range(2))
    assert a == b == _extract_apart(tmp_path, 0) and len(list(tmp_path.iterdir())) == 1


# ---------- attention ----------

def bright_squares(n=40, size=32, dims=2, seed=0):
    "Noise with one bright cell of 8 pixels at a random place, which is the mask; every fourth picture has none."
    g = chance(seed)
    x = g.integers(60, 90, (n, 1, *[size] * dims)).astype(np.uint8)
    mask = np.zeros((n, *[size] * dims), np.uint8)
    for i in range(n):
        at = tuple(slice(8 * k, 8 * k + 8) for k in g.integers(0, size // 8, dims))
        if i % 4: x[(i, 0, *at)], mask[(i, *at)] = 220, 1
    table = pd.DataFrame({"split": ["test"] * n, "patient": [f"p{i // 4}" for i in range(n)]})
    return ImageSet(x, Info("squares", classes={"square": ["none", "square"]}), masks={"square": mask}, table=table)


def looks_at_bright(dims=2, size=32, patch=8):
    "A ViT of one block, its weights set by hand: every token attends to bright patches."
    vit = make_encoder("vit-tiny", dims=dims, size=size, patch=patch, depth=1)
    attend = vit.blocks[0].attn
    with torch.no_grad():
        for p in (vit.embed.weight, vit.embed.bias, attend.qkv.weight, attend.qkv.bias): p.zero_()
        vit.position[:, 0] = 0
        vit.embed.weight[0] = 1 / patch ** dims                                    # channel 0: mean brightness
        step = vit.width // attend.num_heads
        for h in range(attend.num_heads): attend.qkv.bias[h * step], attend.qkv.weight[vit.width + h * step, 0] = 20, 1
    return vit


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_at_the_mask_is_found(dims):
    "A ViT that looks where the mask is beats random weights, which are at chance."
    set = bright_squares(dims=dims, size=32 if dims == 2 else 16)
    found = localisation(looks_at_bright(dims, set.spatial[0]), set, "square", device="cpu")
    empty = found.id % 4 == 0
    assert found[empty].value.isna().all() and found[~empty].value.notna().all()
    mean = found.groupby(["weights", "map", "metric"]).value.mean()
    cells = (set.spatial[0] // 8) ** dims
    for name in ("rollout", "last block", "head 0"):
        assert mean["given", name, "pointing"] == 1 and mean["given", name, "auroc"] > .9 and mean["given", name, "overlap"] > .3 * cells
        assert .7 < mean["random", name, "overlap"] < 1.5
    differ = found[(found["map"] == "rollout") & (found.metric == "overlap")].pivot(index=["group", "id"], columns="weights", values="value").dropna()
    diff, groups = (differ.given - differ.random).to_numpy(), differ.index.get_level_values("group").to_numpy()
    per_group = pseudo_values(lambda keep: (keep @ diff) / keep.sum(1), groups, vectorised=True)
    assert crossed_interval(per_group[None]).low > .2 * cells


def test_rollout_of_a_plain_loop():
    a = torch.rand(2, 3, 4, 10, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    want = []
    for picture in a:
        total = np.eye(10)
        for block in picture:
            mixed = block.mean(0).numpy() + np.eye(10)
            total = mixed / mixed.sum(1, keepdims=True) @ total
        want.append(total)
    assert rollout(a).numpy() == pytest.approx(np.stack(want), abs=1e-6)
    assert rollout(a).sum(-1).numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_pixel_curves_of_scikit_learn(seed):
    from sklearn.metrics import average_precision_score, roc_auc_score
    g = chance(seed)
    a, m = g.random((3, 12, 12)).astype(np.float32), g.integers(0, 2, (3, 12, 12)).astype(np.uint8)
    for measure, found in zip((roc_auc_score, average_precision_score), pixel_curves(a, m)):
        assert found == pytest.approx([measure(y.ravel(), s.ravel()) for y, s in zip(m, a)], abs=1e-6)
    brute = [(s * y).sum() / s.sum() / y.mean() for s, y in zip(a, m)]
    assert attention_overlap(a, m) == pytest.approx(brute, abs=1e-5)
    assert pointing_game(a, m).tolist() == [float(y.ravel()[s.argmax()]) for s, y in zip(a, m)]


def test_maps_leave_the_encoder_alone():
    set, vit = bright_squares(6), make_encoder("vit-tiny", size=32).train()
    state = torch.get_rng_state()
    a, b = maps_of(vit, set, range(6), "cpu", batch=4), maps_of(vit, set, range(6), "cpu", batch=6)
    assert vit.training and torch.equal(state, torch.get_rng_state()) and all(np.allclose(a[k], b[k], atol=1e-5) for k in a)
    control = fresh_like(make_encoder("vit-tiny", size=32, patch=4, heads=2, depth=3), 3)
    want = make_encoder("vit-tiny", size=32, patch=4, heads=2, depth=3, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(control.state_dict().values(), want.state_dict().values(), strict=True))


def test_wrong_input_is_named():
    set = bright_squares(4)
    with pytest.raises(InputError, match="no attention: use a ViT"): maps_of(make_encoder("cnn-tiny"), set, [0])
    with pytest.raises(InputError, match="no mask 'lesion': it has square"): localisation(make_encoder("vit-tiny"), set, "lesion")
    with pytest.raises(InputError, match="ids is empty"): maps_of(make_encoder("vit-tiny", size=32), set, [])
    with pytest.raises(InputError, match="do not fit: give one map and one mask"): pointing_game(np.ones((2, 4, 4)), np.ones((3, 8, 8)))
    with pytest.raises(InputError, match="as `control`"): fresh_like(make_encoder("cnn-tiny"))
