"""Every objective x encoder family x dimensions at toy size: what holds for all of them is tested here, for all of them."""
import pytest
import torch
from ranks import two_processes
from small import every, gradients, small_objective

from tasl_lab.objectives.cards import CARDS
from tasl_lab.objectives.heads import Teacher

HYBRIDS = [("simclr+0.5*masked", f, d) for f in ("CNN", "ViT") for d in (2, 3)]
FALL = {  # share of the first loss that must be gone after 20 steps; small where the loss has a floor (several positives, soft targets, noise)
    "simclr": .7, "mocov3": .8, "pcl": .25, "densecl": .6, "pixpro": .5, "vicregl": .25, "byol": .5, "simsiam": .5, "barlowtwins": .5, "vicreg": .2,
    "swav": .3, "dino": .3, "ibot": .3, "dinov2": .3, "rotation": .5, "relativeposition": .3, "jigsaw": .9, "volumefusion": .15,
    "mae": .3, "spark": .4, "simmim": .2, "inpainting": .7, "denoising": .6, "modelsgenesis": .5, "swinunetr": .35, "dira": .5, "pcrlv2": .5,
    "simclr+0.5*masked": .6}
OFFSET = "an offset in front of a norm over the batch is taken out again"
WITHOUT = {  # parameters that may stay without a gradient, and why
    "encoder.hidden": "stands for hidden tokens in mode 'token', which most objectives do not use",
    "norm_cross_attn": "MONAI's block carries a norm for cross-attention that is switched off",
    "encoder.norm.bias": OFFSET + ", where a ViT feeds such a head alone",
    "head.0.bias": OFFSET, "head.3.bias": OFFSET, "predictor.0.bias": OFFSET, "cell_head.0.bias": OFFSET, "cell_head.3.bias": OFFSET,
    "image.0.bias": OFFSET, "token.0.bias": OFFSET, "predict.0.0.bias": OFFSET, "predict.1.0.bias": OFFSET, "predict.2.0.bias": OFFSET,
    "head.6.bias": "VICReg does not see an offset shared by both views", "cell_head.6.bias": "the same",
}


def untouched(objective):
    "Names of trainable parameters without any gradient; rounding errors do not count as one."
    grads = {k: p.grad for k, p in objective.named_parameters() if p.requires_grad}
    least = 1e-6 * max(g.abs().max() for g in grads.values() if g is not None)
    return [k for k, g in grads.items() if g is None or g.abs().max() < least]


def descend(objective, batch, optimizer, step, progress):
    "One step of training without teachers or queues; returns the loss."
    loss = objective(objective.views(batch, step), progress)
    optimizer.zero_grad()
    objective.backward(loss)
    optimizer.step()
    return loss.total.item()


@pytest.mark.parametrize("spec, family, dims", every() + HYBRIDS)
def test_loss_falls_and_gradients_reach_everything(spec, family, dims):
    objective, batch = small_objective(spec, family, dims)
    optimizer, curve = torch.optim.AdamW(objective.param_groups(), lr=2e-3), []
    for step in range(21):
        curve.append(descend(objective, batch, optimizer, 0, step / 20))  # one batch, one set of views, teachers and queues at rest
        if step == 0: left = untouched(objective)
    assert curve[20] < (1 - FALL[spec]) * curve[0], [round(c, 4) for c in curve]
    assert [k for k in left if not any(w in k for w in WITHOUT)] == []


def states(objective): return {k: v.clone() for k, v in objective.state_dict().items()}


def course(spec, family, dims, seed, steps=3):
    "Losses of some steps on new views, and the objective before and after."
    objective, batch = small_objective(spec, family, dims, seed=seed)
    optimizer, losses, before = torch.optim.AdamW(objective.param_groups(), lr=3e-3), [], states(objective)
    for step in range(steps):
        losses.append(descend(objective, batch, optimizer, step, step / steps))
        objective.after_step(step / steps)
    return losses, before, objective


@pytest.mark.parametrize("spec, family, dims", every() + HYBRIDS)
def test_seed_decides_and_teachers_move(spec, family, dims):
    torch.manual_seed(1)
    first, before, objective = course(spec, family, dims, 0)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, _, other = course(spec, family, dims, 0)
    assert first == again and torch.equal(state, torch.random.get_rng_state())  # chance comes from the seed alone
    assert all(torch.equal(a, b) for a, b in zip(states(objective).values(), states(other).values()))
    assert not set(course(spec, family, dims, 1, 1)[0]) & set(first)
    teachers = [k for k, m in objective.named_modules() if isinstance(m, Teacher)]
    assert bool(teachers) == ("teacher" in str(CARDS.get(spec, "")).lower())  # cards say which objectives have one
    for t in teachers:
        mine = {k for k, p in objective.named_parameters() if k.startswith(t + ".")}
        moved = {k for k in mine if not torch.equal(before[k], objective.state_dict()[k])}
        assert moved and {k for k in mine - moved if not any(w in k for w in WITHOUT)} == set()


@pytest.mark.parametrize("spec, family, dims", every((2,)))
def test_forward_changes_nothing(spec, family, dims):
    objective, batch = small_objective(spec, family, dims)
    before = states(objective)
    views = objective.views(batch, 0)
    first, second = objective(views, .5).total, objective(objective.views(batch, 0), .5).total
    assert torch.equal(first, second) and all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


@pytest.mark.parametrize("spec", [n for n, c in CARDS.items()])
def test_colour_pictures_train_too(spec):
    objective, batch = small_objective(spec, CARDS[spec].encoders[0], channels=3)
    loss = objective(objective.views(batch, 0), 0.).total
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, objective).values())


def on_rank(rank, world=2):
    "Loss and encoder gradient of every objective on this process's share of eight pictures."
    found = {}
    for name, card in CARDS.items():
        objective, batch = small_objective(name, card.encoders[0], batch=8 // world, rank=rank, world=world)
        loss = objective(objective.views(batch, 0), .5).total
        found[name] = loss.detach(), torch.cat([g.flatten() for g in gradients(loss, objective.encoder).values()])
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory): return two_processes(on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(): return on_rank(0, 1)


APART = {}  # objectives whose loss over two processes is not that of one, and why


@pytest.mark.parametrize("name", CARDS)
def test_two_processes_train_as_one(name, ranks, alone):
    "The mean over processes of losses and gradients, as distributed training takes it, is that of one process with all pictures."
    (a, ga), (b, gb), (loss, g) = (r[name] for r in (*ranks, alone))
    assert (torch.allclose((a + b) / 2, loss, atol=1e-5) and torch.allclose((ga + gb) / 2, g, atol=1e-4 * g.abs().max() + 1e-6)) == (name not in APART)
