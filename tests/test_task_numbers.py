"""Regression and reconstruction: metrics agree with independent implementations, wrong input is named, every encoder works, blind features gain nothing."""
import numpy as np
import pandas as pd
import pytest
import torch

from tasl_lab.core import InputError
from tasl_lab.data.brain import brain
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import FeatureBank, extract
from tasl_lab.tasks.heads import fit_ridge
from tasl_lab.tasks.reconstruction import DAMAGE, degrade, degraded, lines, psnr, quality, ssim, unit
from tasl_lab.tasks.registry import make_task, tasks_of
from tasl_lab.tasks.regression import GRID, absolute_error, r_squared, ridge_path, spearman
from tasl_lab.tasks.scores import Scores


@pytest.fixture(scope="module")
def pictures():
    return phantom(240, size=32, seed=0)


def random_raw(seed, n=50):
    "Numbers with many ties, and whole weights of which some are 0."
    g = np.random.default_rng(seed)
    return dict(true=g.integers(0, 8, n) / 3, predicted=g.integers(0, 8, n) / 3), g.integers(0, 4, (4, n)).astype(float)


# ---------- metrics of regression ----------

@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_scikit_learn_and_scipy(seed):
    from scipy.stats import spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score
    raw, w = random_raw(seed)
    y, p = raw["true"], raw["predicted"]
    assert r_squared(raw, w)[:, 0] == pytest.approx([r2_score(y, p, sample_weight=v) for v in w], abs=1e-9)
    assert absolute_error(raw, w)[:, 0] == pytest.approx([mean_absolute_error(y, p, sample_weight=v) for v in w], abs=1e-9)
    several = [np.repeat(np.arange(len(y)), v.astype(int)) for v in w]
    assert spearman(raw, w)[:, 0] == pytest.approx([spearmanr(y[i], p[i]).statistic for i in several], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.regression")
    raw, one = random_raw(seed)[0], np.ones((1, 50))
    y, p = (torch.from_numpy(raw[k]) for k in ("true", "predicted"))
    pairs = ((r_squared, functional.r2_score), (absolute_error, functional.mean_absolute_error), (spearman, functional.spearman_corrcoef))
    for ours, theirs in pairs: assert ours(raw, one)[0, 0] == pytest.approx(float(theirs(p, y)), abs=1e-6)


@pytest.mark.parametrize("metric", [r_squared, absolute_error, spearman])
def test_a_weight_of_two_is_the_picture_twice(metric):
    raw, w = random_raw(9)
    for v, found in zip(w, metric(raw, w)[:, 0]):
        some = np.repeat(np.arange(50), v.astype(int))
        assert found == pytest.approx(metric({k: x[some] for k, x in raw.items()}, np.ones((1, len(some))))[0, 0], abs=1e-12)
        assert found == pytest.approx(metric(raw, v[None] * .3)[0, 0], abs=1e-12)


def test_undefined_without_variation():
    raw = dict(true=np.array([.1, .1, .1, .7]), predicted=np.array([.1, .2, .3, .3]))
    w = np.array([[1., 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert np.isnan(r_squared(raw, w)[[0, 2]]).all() and np.isfinite(r_squared(raw, w)[1]).all()
    assert np.isnan(spearman(raw, w)).all() and np.isnan(absolute_error(raw, w)[2]).all()


# ---------- the fit and the task of regression ----------

def test_ridge_path_of_scikit_learn():
    from sklearn.linear_model import Ridge
    g = np.random.default_rng(0)
    for n, c in ((40, 6), (10, 30)):                                                     # also fewer pictures than features
        x, y = g.normal(size=(n, c)) + 2, g.normal(size=(n, 3))
        for l2, w in zip(GRID, ridge_path(torch.from_numpy(x), torch.from_numpy(y), GRID)):
            want = Ridge(alpha=l2 * n).fit(x, y)
            assert w.numpy() == pytest.approx(np.r_[want.coef_.T, want.intercept_[None]], abs=1e-6)
            assert torch.allclose(w, fit_ridge(torch.from_numpy(x), torch.from_numpy(y), l2), atol=1e-6)


def test_regression_finds_what_is_there_and_nothing_else(pictures):
    y, g = pictures.targets["gain"], np.random.default_rng(0)
    bank = FeatureBank(pictures.ids(), np.c_[2 * y, g.normal(size=(240, 3))].astype(np.float32), [], pictures.spatial, [])
    scores = make_task("regression:gain", pictures).probe(bank, pictures, pictures.budget(100))
    assert scores.value() > .999 and scores.value(metric="spearman") > .999
    mixed = ImageSet(pictures.images, pictures.info, targets={"gain": g.permutation(y)}, table=pictures.table)
    chance = make_task("regression:gain", mixed).probe(bank, mixed, mixed.budget(100))
    assert chance.value() < .1 and abs(chance.value(metric="spearman")) < .4


def test_regression_of_unknown_numbers(pictures, tmp_path):
    y = pictures.targets["organ_area"].copy()
    y[::3] = np.nan
    some = ImageSet(pictures.images, pictures.info, targets={"area": y, "even": np.full(240, 7.), "unknown": np.full(240, np.nan)}, table=pictures.table)
    bank, encoder, budget = extract(make_encoder("cnn-tiny"), some), make_encoder("cnn-tiny"), some.budget(90)
    task = make_task("regression:area", some)
    for scores in (task.probe(bank, some, budget), task.finetune(encoder, some, budget, steps=2, batch=4)):
        assert len(scores.ids) == np.isfinite(y[some.ids("test")]).sum() and np.isfinite(scores.per_image()["value"]).all()
        assert scores.metrics == ["r2", "mae", "spearman"] and np.isfinite(list(scores.values().values())).all()
        assert scores.group_values().without.shape == (len(np.unique(scores.groups)),)
        assert Scores.load(scores.save(tmp_path / "s")).values() == scores.values()
    for call in (lambda t: t.probe(bank, some, budget), lambda t: t.finetune(encoder, some, budget, steps=1)):
        with pytest.raises(InputError, match="'even' of regression:even is 7 in all 90"): call(make_task("regression:even", some))
        with pytest.raises(InputError, match="no.* picture"): call(make_task("regression:unknown", some))
    with pytest.raises(InputError, match="no target 'weight': it has area"): make_task("regression:weight", some)


def test_fine_tuning_does_not_depend_on_the_unit(pictures):
    many = ImageSet(pictures.images, pictures.info, targets={"mm": pictures.targets["gain"] * 1000 + 500, "m": pictures.targets["gain"]}, table=pictures.table)
    options = dict(steps=5, batch=8, precision="fp32")
    a, b = (make_task(f"regression:{t}", many).finetune(make_encoder("cnn-tiny"), many, many.budget(60), **options) for t in ("mm", "m"))
    assert (a.raw["predicted"] - 500) / 1000 == pytest.approx(b.raw["predicted"], abs=1e-3) and a.raw["predicted"].std() > 0


# ---------- damage ----------

@pytest.mark.parametrize("target", DAMAGE)
@pytest.mark.parametrize("dims, channels, dtype", [(2, 1, "uint8"), (2, 3, "uint16"), (3, 1, "float32"), (3, 2, "float16")])
def test_damage_keeps_rows_and_type(target, dims, channels, dtype):
    g = np.random.default_rng(0)
    x = g.random((6, channels, *[16] * dims))
    x = x.astype(dtype) if dtype.startswith("f") else (x * np.iinfo(dtype).max).astype(dtype)
    set = ImageSet(x, Info("random"), targets={"age": np.arange(6)})
    found = degraded(set, target)
    assert found.images.dtype == x.dtype and found.images.shape == x.shape and (found.images != x).any() and found.table.equals(set.table)
    assert np.array_equal(found.targets["age"], set.targets["age"]) and found is make_task(f"reconstruction:{target}", set).inputs(set)
    part = set.subset([4, 1])
    assert np.array_equal(degraded(part, target).images, found.images[[4, 1]])
    assert found.sha256 != set.sha256


def test_damage_by_hand():
    x = torch.zeros(1, 1, 8, 8)
    x[..., :4, :4] = .8
    want = np.interp(np.arange(8) + .5, [2, 6], [1, 0])                                  # pixel centres between the centres of two cells
    assert degrade(x, "superresolution", [0])[0, 0].numpy() == pytest.approx(.8 * np.outer(want, want), abs=1e-6)
    even = torch.full((2, 1, 64, 64), .5)
    noise = degrade(even, "denoise", [0, 1]) - .5
    assert float(noise.std()) == pytest.approx(.1, abs=.005) and not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("shape", [(2, 3, 32, 20), (2, 1, 4, 32, 20)])
def test_k_space_by_a_plain_transform(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * .5
    found = degrade(x, "kspace", ["a", "b"])
    for i, key in enumerate("ab"):
        kept = lines(32, key)
        assert kept.sum() == 8 and kept[15:17].all()
        for plane, have in zip(x[i].reshape(-1, 32, 20), found[i].reshape(-1, 32, 20)):
            k = np.fft.fftshift(np.fft.fft2(plane.numpy()))
            k[~kept] = 0
            assert have.numpy() == pytest.approx(np.abs(np.fft.ifft2(np.fft.ifftshift(k))).clip(0, 1), abs=1e-5)


# ---------- measures of reconstruction ----------

@pytest.mark.parametrize("dims, channels, size", [(2, 1, 32), (2, 3, 20), (3, 1, 13)])
def test_measures_of_torchmetrics(dims, channels, size):
    image = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(size)
    y = torch.rand(5, channels, *[size] * dims, generator=g)
    x = (y + torch.linspace(.02, .3, 5).reshape(-1, *[1] * (dims + 1)) * torch.randn(y.shape, generator=g)).clamp(0, 1)
    found = quality(x, y)
    assert found["ssim"][:, 0] == pytest.approx(image.structural_similarity_index_measure(x, y, data_range=1., reduction="none").numpy(), abs=1e-5)
    assert found["psnr"][:, 0] == pytest.approx([float(image.peak_signal_noise_ratio(a, b, data_range=1.)) for a, b in zip(x, y)], abs=1e-5)


def test_measures_of_monai():
    from monai.metrics import PSNRMetric, SSIMMetric
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 1, 24, 24, generator=g) for _ in range(2))
    assert psnr(x, y).numpy() == pytest.approx(PSNRMetric(max_val=1)(x, y)[:, 0].numpy(), abs=1e-5)
    inner = torch.zeros(4, 24, 24, dtype=bool)
    inner[:, 5:-5, 5:-5] = True                                                          # MONAI's mean is over windows inside the picture
    assert ssim(x, y, inner).numpy() == pytest.approx(SSIMMetric(spatial_dims=2)(x, y)[:, 0].numpy(), abs=1e-5)


def test_measures_inside_the_lesion():
    "Damage outside of the lesion leaves the lesion's measures alone, and damage inside is not diluted by the picture."
    y = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * .5
    lesion = torch.zeros(3, 40, 40, dtype=bool)
    lesion[:2, 4:10, 4:10] = True
    x = y.clone()
    x[0, :, 25:] += .3                                                                   # far away, beyond the window
    x[1, :, 4:10, 4:10] += .1
    found = {k: v[:, 0] for k, v in quality(x, y, lesion).items()}
    assert found["lesion_psnr"][:2] == pytest.approx([100, 20], abs=1e-3)
    assert found["lesion_ssim"][0] == pytest.approx(1, abs=1e-5) and found["lesion_ssim"][1] < .99
    assert np.isnan(found["lesion_psnr"][2]) and np.isnan(found["lesion_ssim"][2]) and found["ssim"][2] == pytest.approx(1)
    assert found["psnr"][1] == pytest.approx(20 + 10 * np.log10(1600 / 36), abs=1e-3)
    everywhere = quality(x, y, torch.ones(3, 40, 40, dtype=bool))
    for k in ("psnr", "ssim"): assert everywhere[f"lesion_{k}"] == pytest.approx(everywhere[k], abs=1e-9)


def test_measures_at_the_edge():
    "A lesion in the corner counts too, and pictures smaller than the window have a smaller one."
    y = torch.rand(1, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    corner = torch.zeros(1, 7, 9, dtype=bool)
    corner[0, 0, 0] = True
    assert float(ssim(y, y)) == pytest.approx(1) and float(ssim(y, y, corner)) == pytest.approx(1)
    assert float(ssim(y.flip(2), y, corner)) < .9


# ---------- the task of reconstruction ----------

@pytest.mark.parametrize("name, dims, preset", [
    ("cnn-tiny", 2, "texture"), ("vit-tiny", 2, "histology"), pytest.param("cnn-tiny", 3, "texture", marks=pytest.mark.slow),
    pytest.param("vit-tiny", 3, "texture", marks=pytest.mark.slow)])
def test_reconstruction_with_every_encoder(name, dims, preset):
    set = phantom(60, size=16 if dims == 3 else 32, dims=dims, seed=0, preset=preset)
    encoder, budget = make_encoder(name, channels=set.channels, dims=dims), set.ids("train")
    for target in DAMAGE:
        task = make_task(f"reconstruction:{target}", set)
        bank = extract(encoder, task.inputs(set))
        a, b = (task.probe(bank, set, budget, seed=1) for _ in range(2))
        tuned = task.finetune(encoder, set, budget, steps=2, batch=4, precision="fp32")
        assert all(np.array_equal(a.raw[k], b.raw[k], equal_nan=True) for k in a.raw) and a.metric == "psnr"
        for scores in (a, tuned):
            assert len(scores.metrics) == 8 and len(scores.per_image()) == len(set.ids("test")) and np.isfinite(scores.value())
            assert -1 <= scores.value(metric="ssim") <= 1 and scores.group_values().without.shape == (len(np.unique(scores.groups)),)
        assert a.value() > a.value(metric="input psnr") - .5
        absent = ~(set.masks["lesion"][a.ids] > 0).reshape(len(a.ids), -1).any(1)
        assert np.array_equal(np.isnan(a.raw["lesion_psnr"][:, 0]), absent)
        seen = task.inputs(set)
        want = psnr(unit(seen.batch(a.ids).images), unit(set.batch(a.ids).images))
        assert a.raw["input_psnr"][:, 0] == pytest.approx(want.numpy()) and tuned.raw["input_psnr"] == pytest.approx(a.raw["input_psnr"])


@pytest.mark.parametrize("target", DAMAGE)
def test_restored_is_better_and_blind_features_gain_nothing(target):
    set = phantom(300, size=32, seed=0)
    task, budget = make_task(f"reconstruction:{target}", set), set.budget(150)
    bank = extract(make_encoder("cnn-tiny"), task.inputs(set))
    mixed = np.random.default_rng(0).permutation(300)
    blind = FeatureBank(bank.ids, bank.pooled[mixed], [m[mixed] for m in bank.maps], bank.spatial, bank.levels)
    gain = [s.value() - s.value(metric="input psnr") for s in (task.probe(b, set, budget) for b in (bank, blind))]
    assert gain[0] > {"denoise": 1, "superresolution": .1, "kspace": .02}[target] and gain[1] < min(.3, gain[0] / 2)


def test_reconstruction_of_brain():
    set = brain(120, size=32, seed=0)
    task = make_task("reconstruction:denoise", set)
    scores = task.probe(extract(make_encoder("cnn-tiny"), task.inputs(set)), set, set.ids("train"))
    values = scores.values()
    assert values["psnr"] > values["input psnr"] + .5 and values["ssim"] > values["input ssim"] and np.isfinite(values["lesion psnr"])


def test_reconstruction_without_masks_or_validation(pictures):
    table = pd.DataFrame({"split": np.repeat(["train", "test"], [200, 40])})
    bare = ImageSet(pictures.images, Info("bare"), table=table)
    assert tasks_of(bare) == [f"reconstruction:{t}" for t in DAMAGE]
    task = make_task("reconstruction:denoise", bare)
    scores = task.probe(extract(make_encoder("cnn-tiny"), task.inputs(bare)), bare, bare.budget(100))
    assert scores.metrics == ["psnr", "input psnr", "ssim", "input ssim"] and scores.info["l2"] == .001 and scores.value() > scores.value(metric="input psnr")


def test_fine_tuned_reconstruction_is_better_than_its_input():
    set = phantom(200, size=32, seed=0)
    scores = make_task("reconstruction:denoise", set).finetune(make_encoder("cnn-tiny"), set, set.ids("train"), steps=60, batch=16)
    assert scores.value() > scores.value(metric="input psnr") + .5


def test_reconstruction_refuses(pictures):
    task = make_task("reconstruction:denoise", pictures)
    with pytest.raises(InputError, match=r"extract\(encoder, task.inputs\(set\)\)"):
        task.probe(extract(make_encoder("cnn-tiny"), pictures), pictures, pictures.budget(50))
    with pytest.raises(InputError, match="use one of denoise"): make_task("reconstruction:deblur", pictures)
    ragged = ImageSet([pictures.images[0], pictures.images[1, :, :16]], Info("ragged"))
    with pytest.raises(InputError, match="differ in size"): make_task("reconstruction:denoise", ragged)
    assert tasks_of(ragged) == []
    odd = FeatureBank(pictures.ids(), np.zeros((240, 2), np.float32), [np.zeros((240, 2, 5, 5), np.float16)], pictures.spatial, [0])
    with pytest.raises(InputError, match="whole number of pixels per cell"): task.probe(odd, pictures, pictures.budget(50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(pictures):
    for spec in ("regression:gain", "reconstruction:denoise", "reconstruction:superresolution", "reconstruction:kspace"):
        task, values = make_task(spec, pictures), []
        for device in ("cpu", "cuda"):
            scores = task.finetune(make_encoder("cnn-tiny"), pictures, pictures.budget(50), steps=3, batch=8, device=device, precision="fp32")
            values.append(scores.value())
        assert values[0] == pytest.approx(values[1], abs=.05)
