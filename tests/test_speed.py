"""Speed changes no result: each fast path against the plain one, and whole runs against each other within the noise of their seeds."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasl_lab import encoders
from tasl_lab.config import PretrainConfig
from tasl_lab.core import pick_precision
from tasl_lab.encoders import make_encoder
from tasl_lab.objectives.heads import GatheredNorm
from tasl_lab.views import warp


def pictures(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 4 - 2


@pytest.mark.parametrize("size, out", [((16, 24), (16, 24)), ((16, 24), (9, 12)), ((8, 10, 12), (8, 10, 12)), ((8, 10, 12), (5, 4, 7))])
def test_warp_samples_where_the_affine_points(size, out):
    "Against PyTorch's own affine grid, in double precision."
    d, g = len(size), torch.Generator().manual_seed(1)
    x = pictures(6, 2, *size)
    affine = torch.cat([torch.eye(d) + .4 * torch.randn(6, d, d, generator=g), torch.randn(6, d, 1, generator=g) * 3], 2)
    n, m = torch.tensor(size, dtype=torch.double), torch.tensor(out, dtype=torch.double)
    a, t = affine[:, :, :d].double(), affine[:, :, d].double()
    matrix = a * m / n[:, None]
    shift = (2 * (t + (a @ ((m - 1) / 2)[:, None])[..., 0]) + 1) / n - 1
    theta = torch.cat([matrix.flip(1, 2), shift.flip(1)[..., None]], 2)
    plain = F.grid_sample(x.double(), F.affine_grid(theta, (6, 1, *out), align_corners=False), padding_mode="border", align_corners=False)
    assert torch.allclose(warp(x, affine, out).double(), plain, atol=2e-5)


def both(monkeypatch, name, value, encoder, *given):
    "Features and gradients with a rule of the encoders as it is and forced to `value`."
    found = []
    for forced in (False, True):
        if forced: monkeypatch.setattr(encoders, name, value)
        encoder.zero_grad()
        f = encoder(*given)
        f.pooled.square().mean().backward()
        found.append([f.pooled.detach(), *(m.detach() for m in f.maps), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
    return zip(*found)


@pytest.mark.parametrize("dims", [2, 3])
def test_layout_changes_no_feature(monkeypatch, dims):
    size, encoder = [32] * dims, make_encoder("cnn-tiny", dims=dims)
    found = both(monkeypatch, "fast_layout", lambda x: torch.contiguous_format, encoder, pictures(2, 1, *size))
    for a, b in found: assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_kernel_changes_no_feature(monkeypatch, fused):
    found = both(monkeypatch, "fused_pays", lambda x: fused, make_encoder("vit-tiny"), pictures(2, 1, 64, 64))
    for a, b in found: assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_head_norm_is_batch_norm_in_values_and_gradients():
    norm, x = GatheredNorm(5), (pictures(12, 5) + 3).requires_grad_()
    z = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    back = pictures(12, 5)
    values = lambda y: (y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), back))
    for a, b in zip(values(norm(x)), values(z)): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def gains(data, precision, seeds):
    "Validation accuracy of a linear probe after a short contrastive training, one number per seed."
    from tasl_lab.tasks.features import extract
    from tasl_lab.tasks.registry import make_task
    from tasl_lab.training import Run
    out = []
    for seed in seeds:
        run = Run(PretrainConfig.of(objective="simclr", steps=40, batch=48, seed=seed, precision=precision, watch=0), data, "cpu")
        for step in range(40): run.step(step)
        task, ids = make_task("classification:class", data), data.budget(80, seed)
        out.append(task.probe(extract(run.encoder, data, device="cpu", precision=precision), data, ids, seed).value())
    return np.array(out)


@pytest.mark.slow
def test_fast_arithmetic_scores_as_exact_arithmetic_does():
    "bf16 with its layout and kernels against fp32: equal seeds, and a mean difference within twice its standard error or .03."
    if pick_precision(device=torch.device("cpu")) != "bf16": pytest.skip("this processor does not multiply in bf16: no run uses it here, and it takes minutes")
    from tasl_lab.data.phantom import phantom
    data, seeds = phantom(500, size=32, seed=11), range(4)
    exact, fast = gains(data, "fp32", seeds), gains(data, "bf16", seeds)
    change = fast - exact
    assert not np.array_equal(exact, fast) and abs(change.mean()) < max(.03, 2 * change.std(ddof=1) / len(change) ** .5), (exact, fast)
