"""Views alone, on one core: ours against the nearest equivalents in torchvision v2, kornia, MONAI and lightly.

All turn 96 uint8 pictures into a float32 batch with mean .5 and deviation .25 taken off: a crop of the same shares and shapes, resized;
both flips; brightness, contrast, gamma. What is not equivalent is in `DIFFERENT`.
"""
import warnings
from functools import partial

import torch
from harness import OURS, Race
from peers import Pictures, installed, pictures

from tasl_lab.policies import policy_for
from tasl_lab.views import make_views, to_float

BATCH, SIZE = 96, 64
SPEC = policy_for("generic").strong
RATIO = 1 / SPEC.ratio, SPEC.ratio
FLIP_Y, FLIP_X = SPEC.flip
GAMMA = tuple(torch.tensor([-SPEC.gamma, SPEC.gamma]).exp().tolist())  # exponents
MEAN, STD = .5, .25
ONE_DRAW = "torchvision v2, one draw for the batch"
DIFFERENT = {
    "torchvision v2": "brightness is a factor, contrast is about the picture's mean; it has adjust_gamma, the random exponent is drawn here",
    ONE_DRAW: "as torchvision v2, and all pictures of a batch get the same crop, flips and intensities",
    "kornia": "contrast is about zero, and it clips to 0..1, as brightness does; crops are cut out and resized one by one, its default",
    "MONAI": "it has no random resized crop: each side is drawn on its own, in whole pixels, then resized; contrast is about zero",
    "lightly": "two views of each PIL picture, both counted; brightness is a factor, contrast about the mean, shapes 3/4 to 4/3, no gamma",
}


class Ours:
    "All pictures of a batch at once, one draw per picture."
    def __init__(self, images): self.images, self.step = torch.from_numpy(images), 0

    def __call__(self):
        self.step += 1
        return make_views(to_float(self.images), [SPEC], 0, self.step)[0].x


def torchvision_transform():
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional
    gamma = v2.Lambda(lambda x: functional.adjust_gamma(x, torch.empty(()).uniform_(-SPEC.gamma, SPEC.gamma).exp().item()))
    return v2.Compose([
        v2.RandomResizedCrop(SIZE, SPEC.scale, RATIO, antialias=False), v2.RandomVerticalFlip(FLIP_Y), v2.RandomHorizontalFlip(FLIP_X),
        v2.ColorJitter(SPEC.brightness, SPEC.contrast), gamma, v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN], [STD])])


def torchvision_pictures(images):
    transform, x = torchvision_transform(), torch.from_numpy(images)
    return lambda: torch.stack([transform(picture) for picture in x])


def torchvision_batch(images):
    transform, x = torchvision_transform(), torch.from_numpy(images)
    return lambda: transform(x)


def kornia_batch(images):
    import kornia.augmentation as K
    x = torch.from_numpy(images)
    transform = K.AugmentationSequential(
        K.RandomResizedCrop((SIZE, SIZE), SPEC.scale, RATIO), K.RandomVerticalFlip(p=FLIP_Y), K.RandomHorizontalFlip(p=FLIP_X),
        K.RandomBrightness((1 - SPEC.brightness, 1 + SPEC.brightness), p=1.), K.RandomContrast((1 - SPEC.contrast, 1 + SPEC.contrast), p=1.),
        K.RandomGamma(GAMMA, p=1.), K.Normalize(torch.tensor([MEAN]), torch.tensor([STD])), same_on_batch=False)
    return lambda: transform(x.float() / 255)


def monai_pictures(images):
    import monai.transforms as M
    from monai.data import set_track_meta
    set_track_meta(False)
    low = round(SIZE * SPEC.scale[0] ** .5)
    transform = M.Compose([
        M.ScaleIntensityRange(0, 255, 0, 1), M.RandSpatialCrop((low, low), (SIZE, SIZE), random_size=True), M.Resize((SIZE, SIZE), mode="bilinear"),
        M.RandFlip(FLIP_Y, 0), M.RandFlip(FLIP_X, 1), M.RandShiftIntensity(SPEC.brightness, prob=1.), M.RandScaleIntensity(SPEC.contrast, prob=1.),
        M.RandAdjustContrast(prob=1., gamma=GAMMA), M.NormalizeIntensity(MEAN, STD)])
    x = torch.from_numpy(images)
    return lambda: torch.stack([transform(picture) for picture in x])


def lightly_pictures(images):
    from lightly.transforms import SimCLRTransform
    channels = images.shape[1]
    transform = SimCLRTransform(
        SIZE, cj_prob=1., cj_bright=SPEC.brightness, cj_contrast=SPEC.contrast, cj_sat=0., cj_hue=0., min_scale=SPEC.scale[0], random_gray_scale=0.,
        gaussian_blur=0., vf_prob=FLIP_Y, hf_prob=FLIP_X, normalize={"mean": [MEAN] * channels, "std": [STD] * channels})
    data = Pictures(images, transform)
    return lambda: torch.stack([view for i in range(len(data)) for view in data[i][0]])


WAYS = {"torchvision v2": torchvision_pictures, ONE_DRAW: torchvision_batch, "kornia": kornia_batch, "MONAI": monai_pictures, "lightly": lightly_pictures}


def counted(make, times: int) -> int:
    "Views made in `times` calls."
    return sum(len(make()) for _ in range(times))


def race(channels: int, quick: bool) -> Race:
    torch.set_num_threads(1)
    images = pictures(SIZE, channels, BATCH)
    makers = {OURS: Ours(images)} | {name: way(images) for name, way in WAYS.items() if installed(name.split()[0].lower())}
    times = {OURS: 20, ONE_DRAW: 20, "kornia": 5}  # the others take a call per picture
    contenders = {name: partial(counted, make, 1 if quick else times.get(name, 2)) for name, make in makers.items()}
    return Race("views", f"strong view of policy generic, {SIZE}x{SIZE} {'grey' if channels == 1 else 'RGB'}, batch {BATCH}, one core", contenders, "views")


def races(quick: bool) -> list[Race]:
    warnings.filterwarnings("ignore", module="monai")
    return [race(channels, quick) for channels in (1, 3)]


def extra(quick: bool) -> dict:
    "How the contenders differ from ours."
    return {"not equivalent": DIFFERENT}
