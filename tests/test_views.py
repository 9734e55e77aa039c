"""Views: geometry and blur agree with SciPy, masks count, and every random number follows from (seed, step) alone."""
import numpy as np
import pytest
import torch
from scipy import ndimage

from tasl_lab.core import InputError
from tasl_lab.policies import POLICIES, policy_for
from tasl_lab.views import View, ViewSpec, _blur, compose, correspond, draw_mask, invert, make_views, to_float, warp

SIZES = {2: (13, 18), 3: (7, 9, 11)}
RICH = ViewSpec(scale=(.3, .9), ratio=1.5, flip=(.5, .5), rotate=40)
LOUD = ViewSpec(scale=(.3, .9), flip=(.5, .5), brightness=.1, contrast=.3, gamma=.2, color=.2)


def pictures(dims=2, n=4, channels=1, seed=0):
    return torch.rand(n, channels, *SIZES[dims], generator=torch.Generator().manual_seed(seed)) * 4 - 2


def random_affine(dims, n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.eye(dims) + .5 * torch.randn(n, dims, dims, generator=g), 6 * torch.rand(n, dims, 1, generator=g)], 2)


def places(affine, out):
    "Where each output pixel lies in the source, one matrix product per pixel: (d, *out)."
    a = affine.numpy().astype(float)
    at = np.empty((len(a), *out))
    for cell in np.ndindex(*out): at[(slice(None), *cell)] = a[:, :-1] @ np.array(cell, float) + a[:, -1]
    return at


# ---------- geometry ----------

@pytest.mark.parametrize("mode, order", [("bilinear", 1), ("nearest", 0)])
@pytest.mark.parametrize("dims, out", [(2, (10, 7)), (3, (5, 6, 4))])
def test_warp_is_map_coordinates(dims, out, mode, order):
    x, affine = pictures(dims, channels=2), random_affine(dims)
    got = warp(x, affine, out, mode)
    for i in range(len(x)):
        at = places(affine[i], out)
        for c in range(2):
            expected = ndimage.map_coordinates(x[i, c].numpy().astype(float), at, order=order, mode="nearest")
            same = np.isclose(got[i, c].numpy(), expected, atol=1e-4)
            assert same.all() if order else same.mean() > .98  # a pixel that lies halfway may be rounded either way


@pytest.mark.parametrize("dims", [2, 3])
def test_view_is_its_source_seen_through_its_affine(dims):
    x = pictures(dims)
    for view in make_views(x, [RICH, ViewSpec(size=6, scale=(.5, .5), rotate=20)], 0, 0):
        for i in range(len(x)):
            expected = ndimage.map_coordinates(x[i, 0].numpy().astype(float), places(view.affine[i], view.x.shape[2:]), order=1, mode="nearest")
            assert np.allclose(view.x[i, 0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_crops_cover_the_share_asked_for_and_stay_inside(dims):
    x = torch.zeros(200, 1, *[20] * dims)
    view = make_views(x, [ViewSpec(size=8, scale=(.2, .7), flip=(.5, .5))], 0, 0)[0]
    share = torch.linalg.det(view.affine[:, :, :dims]).abs() * 8**dims / 20**dims
    assert share.min() >= .2 - 1e-4 and share.max() <= .7 + 1e-4 and share.max() - share.min() > .4
    corners = torch.stack(torch.meshgrid(*[torch.tensor([-.5, 7.5])] * dims, indexing="ij"), -1).reshape(-1, dims)  # outer edges of the view
    at = torch.einsum("nij,kj->nki", view.affine[:, :, :dims], corners) + view.affine[:, None, :, dims]
    assert at.min() >= -.5 - 1e-4 and at.max() <= 19.5 + 1e-4


def test_flips_and_rotation_have_the_chance_and_range_asked_for():
    view = make_views(torch.zeros(2000, 1, 8, 8), [ViewSpec(flip=(0., .3))], 0, 0)[0]
    assert (view.affine[:, 0, 0] > 0).all() and abs((view.affine[:, 1, 1] < 0).float().mean() - .3) < .05
    turned = make_views(torch.zeros(2000, 1, 8, 8), [ViewSpec(rotate=30)], 0, 0)[0]
    angle = torch.rad2deg(torch.atan2(turned.affine[:, 1, 0], turned.affine[:, 0, 0]))
    assert angle.abs().max() <= 30.01 and angle.min() < -27 and angle.max() > 27
    volume = make_views(torch.zeros(50, 1, 8, 8, 8), [ViewSpec(rotate=30)], 0, 0)[0].affine
    assert torch.allclose(volume[:, 0], torch.tensor([1., 0, 0, 0]).expand(50, 4))  # turned in the plane of the last two axes only


@pytest.mark.parametrize("dims", [2, 3])
def test_compose_and_invert(dims):
    a, b, p = random_affine(dims), random_affine(dims, seed=2), torch.rand(4, dims, 1)
    use = lambda m, q: m[:, :, :dims] @ q + m[:, :, dims:]
    assert torch.allclose(use(compose(a, b), p), use(a, use(b, p)), atol=1e-4)
    assert torch.allclose(use(invert(a), use(a, p)), p, atol=1e-3)


@pytest.mark.parametrize("dims, stride", [(2, 2), (2, 5), (3, 2)])
def test_correspond_is_brute_force(dims, stride):
    x = pictures(dims)
    a, b = make_views(x, [RICH, ViewSpec(size=8, scale=(.4, .8), rotate=20)], 0, 0)
    there, inside = correspond(a, b, stride)
    grid = [n // stride for n in a.x.shape[2:]]
    assert there.shape == (4, *grid, dims) and inside.shape == (4, *grid)
    for i in range(4):
        back = np.linalg.inv(np.vstack([b.affine[i].numpy().astype(float), [0.] * dims + [1.]]))
        for cell in np.ndindex(*grid):
            center = np.array([np.mean(range(c * stride, (c + 1) * stride)) for c in cell])
            source = a.affine[i, :, :dims].numpy() @ center + a.affine[i, :, dims].numpy()
            expected = (back @ np.append(source, 1))[:dims]
            assert np.allclose(there[(i, *cell)].numpy(), expected, atol=1e-3)
            edge = min(min(e + .5, n - .5 - e) for e, n in zip(expected, b.x.shape[2:]))
            if abs(edge) > 1e-3: assert inside[(i, *cell)].item() == (edge > 0)


# ---------- intensity ----------

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("sigma", [.4, 1., 1.7])
def test_blur_is_gaussian_filter(dims, sigma):
    x = pictures(dims, channels=2)
    got = _blur(x, torch.full((4,), sigma))
    radius = int(np.ceil(3 * sigma))
    expected = [[ndimage.gaussian_filter(c.numpy().astype(float), sigma, mode="nearest", truncate=radius / sigma) for c in p] for p in x]
    assert np.allclose(got.numpy(), expected, atol=1e-4)


def test_blur_of_one_picture_leaves_the_others():
    x = pictures()
    got = _blur(x, torch.tensor([1.5, 0., 0., 0.]))
    assert torch.allclose(got[1:], x[1:], atol=1e-6) and not torch.allclose(got[0], x[0], atol=.1)
    assert torch.equal(_blur(x, torch.zeros(4)), x)


def test_blur_does_not_depend_on_its_company():
    x, sigma = pictures(), torch.tensor([1., 1., 2.5, 2.5])
    assert torch.allclose(_blur(x, sigma)[:2], _blur(x[:2], sigma[:2]), atol=1e-5)


@pytest.mark.parametrize("dtype, top", [(torch.uint8, 255), (torch.uint16, 65535), (torch.float16, 1), (torch.float32, 1)])
def test_full_scale_becomes_minus_two_to_two(dtype, top):
    x = torch.tensor([0, top]).to(dtype)
    assert to_float(x).tolist() == [-2, 2] and to_float(x).dtype == torch.float32 and x[1].item() == top  # the source is not changed


def test_intensity_is_one_affine_and_one_power_per_picture():
    x = pictures(n=3, channels=2)
    got = make_views(x, [ViewSpec(brightness=.1, contrast=.3)], 0, 0)[0].x
    for a, b in zip(x, got):  # gain and offset are shared by the channels, and undone by a fit
        gain, offset = np.polyfit(a.flatten().numpy(), b.flatten().numpy(), 1)
        assert np.allclose(a.numpy() * gain + offset, b.numpy(), atol=1e-4) and .7 <= gain <= 1.3 and abs(offset) <= .4
    got = make_views(x, [ViewSpec(gamma=.5)], 0, 0)[0].x
    power = torch.log((got + 2) / 4) / torch.log((x + 2) / 4)
    for p in power: assert torch.allclose(p, p.flatten()[0], atol=1e-2) and np.exp(-.5) <= p.flatten()[0] <= np.exp(.5)


def test_noise_has_the_size_asked_for():
    got = make_views(torch.zeros(8, 1, 32, 32), [ViewSpec(noise=.05)], 0, 0)[0].x
    assert abs(got.std().item() - .2) < .01 and abs(got.mean().item()) < .01 and not torch.equal(got[0], got[1])


# ---------- masks ----------

@pytest.mark.parametrize("grid", [(2, 1), (4, 4), (3, 5), (2, 2, 2), (3, 4, 5)])
@pytest.mark.parametrize("ratio", [.01, .25, .6, .75, .99])
def test_mask_counts(grid, ratio):
    cells = int(np.prod(grid))
    mask = draw_mask(20, grid, ratio, 0)
    assert mask.shape == (20, *grid) and mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [min(max(round(ratio * cells), 1), cells - 1)] * 20


def test_mask_is_fair_to_every_cell():
    share = draw_mask(4000, (4, 4), .5, 0).float().mean(0)
    assert (share - .5).abs().max() < .04


@pytest.mark.parametrize("grid, ratio, words", [((1, 1), .5, r"\(1, 1\)"), ((4, 4), 0, "ratio is 0"), ((4, 4), 1., "ratio is 1"),
                                              ((4, 4), float("nan"), "nan")])
def test_impossible_mask(grid, ratio, words):
    with pytest.raises(InputError, match=words): draw_mask(2, grid, ratio, 0)


# ---------- chance ----------

@pytest.mark.parametrize("dims", [2, 3])
def test_views_follow_from_seed_and_step_alone(dims):
    x, spec = pictures(dims), ViewSpec(scale=(.3, .9), flip=(.5, .5), contrast=.3, noise=.02, blur=(.5, .5, 1.))
    torch.manual_seed(0)
    one = make_views(x, [spec, spec], 5, 7)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    two = make_views(x, [spec, spec], 5, 7)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.affine, b.affine) for a, b in zip(one, two))
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is neither used nor moved
    for other in (make_views(x, [spec], 6, 7)[0], make_views(x, [spec], 5, 8)[0], one[1]): assert not torch.equal(one[0].affine, other.affine)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spec", [
    pytest.param(s, id=k)
    for k, s in {"rich": RICH, "loud": LOUD, "blur": ViewSpec(blur=(.5, .3, .9)), **{m: policy_for(m).strong for m in POLICIES}}.items()])
def test_ranks_see_their_part_of_the_global_batch(spec, world):
    x, n = pictures(n=8), 8 // world
    whole = make_views(x, [spec, spec], 0, 3)
    parts = [make_views(x[r * n:(r + 1) * n], [spec, spec], 0, 3, ids=np.arange(r * n, (r + 1) * n), rank=r, world=world) for r in range(world)]
    for k in range(2):
        assert torch.equal(torch.cat([p[k].affine for p in parts]), whole[k].affine)
        assert torch.allclose(torch.cat([p[k].x for p in parts]), whole[k].x, atol=1e-4)
        assert torch.cat([p[k].source_id for p in parts]).tolist() == list(range(8))


def test_masks_of_ranks_are_parts_of_the_global_mask():
    whole = draw_mask(8, (4, 4), .6, 1, 2)
    assert torch.equal(torch.cat([draw_mask(2, (4, 4), .6, 1, 2, rank=r, world=4) for r in range(4)]), whole)
    assert not torch.equal(whole, draw_mask(8, (4, 4), .6, 1, 3)) and not torch.equal(whole, draw_mask(8, (4, 4), .6, 2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parameters_are_equal_on_the_gpu():
    x = pictures()
    for a, b in zip(make_views(x, [RICH, LOUD], 0, 0), make_views(x.cuda(), [RICH, LOUD], 0, 0)):
        assert torch.equal(a.affine, b.affine) and torch.allclose(a.x, b.x.cpu(), atol=1e-3)


def test_plain_view_is_the_picture_itself():
    x = pictures()
    view = make_views(x, [ViewSpec()], 0, 0)[0]
    assert torch.equal(view.x, x) and view.mask is None and isinstance(view, View)


@pytest.mark.parametrize("dims, size", [(2, (40, 40)), (2, (24, 40)), (3, (10, 24, 40))])
def test_turned_crops_stay_inside_the_picture(dims, size):
    "All four corners of each crop in the turned plane lie within the picture's edges."
    view = make_views(torch.zeros(200, 1, *size), [ViewSpec(scale=(.2, 1.), ratio=1.4, rotate=180, flip=(.5, .5))], 0, 0)[0]
    corners = torch.cartesian_prod(*[torch.tensor([-.5, n - .5]) for n in size])
    at = torch.einsum("bij,kj->bki", view.affine[:, :, :dims], corners) + view.affine[:, None, :, dims]
    assert (at >= -.5 - 1e-3).all() and (at <= torch.tensor(size) - .5 + 1e-3).all()
    area = torch.linalg.det(view.affine[:, :, :dims]).abs()
    assert area.max() > .4 and area.min() > .05  # and they are not shrunk to nothing


def test_crops_that_do_not_turn_are_what_they_were():
    view = make_views(torch.zeros(4, 1, 32, 32), [ViewSpec(scale=(.4, 1.), ratio=1.2, flip=(.5, .5))], 3, 5)[0]
    assert torch.allclose(view.affine[0], torch.tensor([[-.938333, 0, 29.465357], [0, .816464, 4.752188]]), atol=1e-4)
