"""stable-pretraining's recipes (0.1.8) on our encoder, run by its own `Manager` and Lightning's `Trainer.fit`, which pauses between portions.

* SimCLR, BYOL: benchmarks/cifar10/{simclr,byol}-resnet18.py; DINO: benchmarks/imagenet100/dino-resnet18.py, also on the ViT, whose own recipe has
  65,536 prototypes instead of 4,096; MAE: the ViT-tiny of the package's tests/integration/test_mae_inet10.py.
* Kept: transforms, dataset wrapper, DataModule, forward functions, losses, heads, optimisers, schedules, teacher callback and the callbacks that the
  package adds to every trainer; precision "16-mixed", which on a CPU is bf16, or fp32 where the processor does not multiply in bf16.
* Left out, to its advantage: online probes and checkpoints (MAE's recipe encodes each batch once more for the probes).
* Changed: encoder, batch, picture size; `transforms.RGB` is left out for grey pictures; small views of DINO as in `peer_lightly.py`.
"""
import logging
import os
import tempfile
import threading
import warnings

os.environ.setdefault("LOGURU_LEVEL", "ERROR")
os.environ.setdefault("WANDB_MODE", "disabled")

import lightning as pl  # noqa: E402
import stable_pretraining as spt  # noqa: E402
import torch  # noqa: E402
from peers import SAME_DINO, SAME_MAE, Case, Pictures, Pooled, Tokens, loader, pictures  # noqa: E402
from stable_pretraining import forward  # noqa: E402
from stable_pretraining.data import transforms as T  # noqa: E402
from torch import nn  # noqa: E402

from tasl_lab.core import pick_precision  # noqa: E402

EPOCHS = 1000  # of the schedules, as in its recipes
PRECISION = "16-mixed" if pick_precision(device=torch.device("cpu")) == "bf16" else "32-true"
FOLDER = tempfile.TemporaryDirectory(prefix="stable-pretraining-")  # for what a run writes
LARS = {"optimizer": {"type": "LARS", "lr": 5, "weight_decay": 1e-6}, "scheduler": {"type": "LinearWarmupCosineAnnealing"}, "interval": "epoch"}


def quiet():
    "Neither progress bars nor notes."
    spt.set(cache_dir=FOLDER.name, progress_bar="none", requeue_checkpoint=False, verbose="ERROR",
            default_callbacks={"module_summary": False})
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"): logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning", "stable_pretraining", "lance", "torch"): warnings.filterwarnings("ignore", module=name)


# --- transforms -----------------------------------------------------------------------------------------------------------------------

def finish(case: Case):
    "To a normalised tensor."
    return T.ToImage(mean=[.5], std=[.25]) if case.channels == 1 else T.ToImage(**spt.data.static.ImageNet)


def compose(case: Case, *parts): return T.Compose(*([] if case.channels == 1 else [T.RGB()]), *parts, finish(case))


def jitter(): return T.ColorJitter(brightness=.4, contrast=.4, saturation=.2, hue=.1, p=.8), T.RandomGrayscale(p=.2)


def plain_view(case: Case, scale=(.08, 1.)):
    "A view of SimCLR or BYOL."
    return compose(case, T.RandomResizedCrop((case.size, case.size), scale=scale), T.RandomHorizontalFlip(p=.5), *jitter())


def dino_view(case: Case, size: int, scale: tuple, blur: float, solarize=False):
    extra = [T.RandomSolarize(threshold=.5, p=.2)] if solarize else []
    return compose(case, T.RandomResizedCrop((size, size), scale=scale), *jitter(), T.PILGaussianBlur(p=blur), *extra, T.RandomHorizontalFlip(p=.5))


def dino_views(case: Case):
    views = {"global_1": dino_view(case, case.size, (.4, 1.), 1.), "global_2": dino_view(case, case.size, (.4, 1.), .1, True)}
    return T.MultiViewTransform(views | {f"local_{i}": dino_view(case, case.small, (.05, .4), .5) for i in range(1, 7)})


# --- modules --------------------------------------------------------------------------------------------------------------------------

def mlp(*widths, between=nn.ReLU, norm=True):
    "Linear layers with batch norm and an activation between them."
    layers = []
    for a, b in zip(widths[:-2], widths[1:-1]): layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), between()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def slow(module, start): return spt.TeacherStudentWrapper(module, warm_init=True, base_ema_coefficient=start, final_ema_coefficient=1.)


def simclr(case: Case):
    encoder = case.make_encoder()
    module = spt.Module(backbone=Pooled(encoder), projector=mlp(encoder.width, 2048, 2048, 256), forward=forward.simclr,
                        simclr_loss=spt.losses.NTXEntLoss(temperature=.5), optim=LARS)
    return module, T.MultiViewTransform([plain_view(case), plain_view(case)])


def byol(case: Case):
    encoder = case.make_encoder()
    module = spt.Module(backbone=slow(Pooled(encoder), .996), projector=slow(mlp(encoder.width, 2048, 128), .996), predictor=mlp(128, 2048, 128),
                        forward=forward.byol, byol_loss=spt.losses.BYOLLoss(), optim=LARS)
    return module, T.MultiViewTransform([plain_view(case, (.2, 1.)), plain_view(case)])


def dino(case: Case):
    encoder, s = case.make_encoder(), SAME_DINO if case.same else {"hidden": 2048, "bottleneck": 256, "prototypes": 4096}
    head = nn.Sequential(mlp(encoder.width, s["hidden"], s["hidden"], s["bottleneck"], between=nn.GELU, norm=not case.same),
                         spt.backbone.L2Norm(), nn.Linear(s["bottleneck"], s["prototypes"], bias=False))
    optim = LARS | {"optimizer": {"type": "LARS", "lr": .3, "weight_decay": 1e-6, "clip_lr": True, "eta": .02, "exclude_bias_n_norm": True}}
    module = spt.Module(backbone=slow(Pooled(encoder), .9995), projector=slow(head, .9995), forward=forward.dino, optim=optim,
                        dino_loss=spt.losses.DINOv1Loss(temperature_student=.1, center_momentum=.9), warmup_temperature_teacher=.04,
                        temperature_teacher=.07, warmup_epochs_temperature_teacher=50)
    return module, dino_views(case)


class Visible(nn.Module):
    "Stands where its `MaskedEncoder` stands: our ViT on the patches that its masking leaves."
    num_prefix_tokens = 1

    def __init__(self, encoder, masking, grid):
        super().__init__()
        self.tokens, self.masking, self.grid = Tokens(encoder), masking, grid

    def forward(self, images):
        cells = images.new_zeros(len(images), self.grid ** 2, 1)
        mask = self.masking(cells, self.grid, self.grid).mask
        encoded = self.tokens(images, mask.bool().reshape(-1, self.grid, self.grid))
        keep = mask.argsort(dim=1, stable=True)[:, :encoded.shape[1] - 1]                # our ViT returns tokens in this order
        return spt.backbone.vit.MaskedEncoderOutput(encoded=encoded, mask=mask, ids_keep=keep, grid_size=(self.grid, self.grid))


def mae_forward(self, batch, stage):
    out = spt.MAE.forward(self, batch["image"])
    self.log(f"{stage}/loss", out.loss, on_step=True, on_epoch=True)
    return {"loss": out.loss}


class MAE(spt.MAE):
    "Its `MAE`, the encoder exchanged."
    def __init__(self, case: Case, decoder_embed_dim, decoder_depth, decoder_num_heads, mask_ratio):
        spt.Module.__init__(self, forward=mae_forward)
        encoder = case.make_encoder()
        grid, patch = case.size // encoder.patch, encoder.patch
        self.masking = spt.backbone.PatchMasking(mask_ratio=mask_ratio, block_size=1)
        self.encoder = Visible(encoder, self.masking, grid)
        self.decoder = spt.backbone.MAEDecoder(embed_dim=encoder.width, decoder_embed_dim=decoder_embed_dim, output_dim=patch ** 2 * case.channels,
                                               num_patches=grid ** 2, depth=decoder_depth, num_heads=decoder_num_heads)
        self.loss_fn = spt.losses.MAELoss(patch_size=patch, loss_type="mse", mask_only=True, patch_normalize=True)
        self.optim = {"optimizer": {"type": "AdamW", "lr": 5e-4, "weight_decay": .05, "betas": (.9, .95)},
                      "scheduler": {"type": "LinearWarmupCosineAnnealing"}, "interval": "epoch"}


def mae(case: Case):
    sizes = (SAME_MAE["decoder"], SAME_MAE["depth"], 16, SAME_MAE["ratio"]) if case.same else (192, 4, 3, .75)
    crop = T.RandomResizedCrop((case.size, case.size), scale=(.2, 1.))
    return MAE(case, *sizes), compose(case, crop, T.RandomHorizontalFlip(p=.5))


RECIPES = {"simclr": simclr, "byol": byol, "dino": dino, "mae": mae}


# --- loop -----------------------------------------------------------------------------------------------------------------------------

class Pause(pl.Callback):
    "Holds the training at the end of each epoch until it may go on."
    def __init__(self): self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_epoch_end(self, trainer, module):
        self.done.release()
        self.go.acquire()


class Stable:
    "Its training, in a thread of its own; one epoch per call."
    def __init__(self, case: Case, workers: int):
        quiet()
        self.case, self.pause, self.thread, self.failure = case, Pause(), None, None
        module, transform = RECIPES[case.objective](case)
        data = spt.data.FromTorchDataset(Pictures(pictures(case.size, case.channels)), names=["image", "label"], transform=transform)
        self.trainer = pl.Trainer(max_epochs=EPOCHS, num_sanity_val_steps=0, precision=PRECISION, logger=False, enable_checkpointing=False,
                                  callbacks=[self.pause], enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        self.manager = spt.Manager(trainer=self.trainer, module=module, data=spt.data.DataModule(train=loader(data, case, workers)), seed=0)

    def fit(self):
        try: self.manager()
        except BaseException as e: self.failure = e
        finally: self.pause.done.release()

    def __call__(self) -> int:
        before = self.trainer.global_step
        if self.thread: self.pause.go.release()
        else:
            self.thread = threading.Thread(target=self.fit, daemon=True)
            self.thread.start()
        self.pause.done.acquire()
        if self.failure: raise self.failure
        return (self.trainer.global_step - before) * self.case.batch

    def close(self):
        if self.thread and self.thread.is_alive():
            self.trainer.should_stop = True
            self.pause.go.release()
            self.thread.join()
        self.trainer = self.manager = None
