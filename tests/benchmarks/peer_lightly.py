"""lightly's recipes on our encoder: the examples of its documentation (examples/pytorch, version 1.6), with transforms, heads and losses of the package.

Kept: transform, DataLoader, heads, loss, optimiser, momentum updates, order of the loop. Changed: encoder, batch, picture size, and
* hidden widths are the example's, input widths the encoder's;
* blur is left out where the example leaves it out for small pictures (SimCLR, BYOL), and stays where it does not (DINO, DenseCL);
* small views of DINO measure 96/224 of the picture, rounded to cells of the encoder;
* the slow network of DenseCL makes the keys, without gradients; the example runs the trained one again. The first view alone asks, in the
  example and here; where the work shall be the same both do;
* MAE encodes visible patches by our ViT. Its decoder is the lighter one of the two that are published (one block).
"""
import copy
import warnings
from contextlib import nullcontext

import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models import utils
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DenseCLProjectionHead, DINOProjectionHead, SimCLRProjectionHead
from lightly.transforms import DenseCLTransform, DINOTransform, MAETransform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import cosine_schedule
from peers import SAME_DENSECL, SAME_DINO, SAME_MAE, Case, Coarsest, Overlaid, Pictures, Pooled, Tokens, loader, pictures
from torch import nn

EPOCHS = 1000  # of the schedules
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # its head for DINO uses an older weight norm
SGD = lambda model: torch.optim.SGD(model.parameters(), lr=.06)


def slow(*modules) -> list:
    "Copies without gradients."
    copies = [copy.deepcopy(m) for m in modules]
    for m in copies: utils.deactivate_requires_grad(m)
    return copies


class Recipe(nn.Module):
    "A method: its transform, its loss on a list of views, its optimiser."
    optimizer = staticmethod(SGD)

    def __init__(self, case: Case):
        super().__init__()
        self.case, self.encoder, self.pairs = case, case.make_encoder(), []
        self.norm = {"mean": [.5], "std": [.25]} if case.channels == 1 else IMAGENET_NORMALIZE
        self.build(self.encoder.width)

    def follow(self, epoch: int) -> None:
        "Slow copies move towards what they are copies of."
        for fast, behind in self.pairs: utils.update_momentum(fast, behind, m=cosine_schedule(epoch, EPOCHS, .996, 1))

    def before_update(self, epoch: int) -> None: "What is done to the gradients."


class SimCLR(Recipe):
    def build(self, width):
        self.backbone, self.head, self.criterion = Pooled(self.encoder), SimCLRProjectionHead(width, 512, 128), NTXentLoss()

    def transform(self): return SimCLRTransform(input_size=self.case.size, gaussian_blur=0., normalize=self.norm)

    def forward(self, views, epoch):
        a, b = (self.head(self.backbone(v)) for v in views)
        return self.criterion(a, b)


class BYOL(Recipe):
    def build(self, width):
        self.backbone, self.head, self.predictor = Pooled(self.encoder), BYOLProjectionHead(width, 1024, 256), BYOLPredictionHead(256, 1024, 256)
        self.slow_backbone, self.slow_head = slow(self.backbone, self.head)
        self.pairs = [(self.backbone, self.slow_backbone), (self.head, self.slow_head)]
        self.criterion = NegativeCosineSimilarity()

    def transform(self):
        given = dict(input_size=self.case.size, gaussian_blur=0., normalize=self.norm)
        return BYOLTransform(BYOLView1Transform(**given), BYOLView2Transform(**given))

    def forward(self, views, epoch):
        p, z = [], []
        for v in views:
            p.append(self.predictor(self.head(self.backbone(v))))
            z.append(self.slow_head(self.slow_backbone(v)).detach())
        return .5 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0]))


class DINO(Recipe):
    optimizer = staticmethod(lambda model: torch.optim.Adam(model.parameters(), lr=.001))

    def build(self, width):
        sizes = width, SAME_DINO["hidden"], SAME_DINO["bottleneck"], SAME_DINO["prototypes"]
        self.backbone, self.head, self.slow_head = Pooled(self.encoder), DINOProjectionHead(*sizes, freeze_last_layer=1), DINOProjectionHead(*sizes)
        self.slow_backbone, = slow(self.backbone)
        utils.deactivate_requires_grad(self.slow_head)
        self.pairs = [(self.backbone, self.slow_backbone), (self.head, self.slow_head)]
        self.criterion = DINOLoss(output_dim=sizes[-1], warmup_teacher_temp_epochs=5)

    def transform(self): return DINOTransform(global_crop_size=self.case.size, local_crop_size=self.case.small, normalize=self.norm)

    def forward(self, views, epoch):
        teacher = [self.slow_head(self.slow_backbone(v)) for v in views[:2]]
        return self.criterion(teacher, [self.head(self.backbone(v)) for v in views], epoch=epoch)

    def before_update(self, epoch): self.head.cancel_last_layer_gradients(current_epoch=epoch)


class DenseCL(Recipe):
    def build(self, _):
        self.backbone = Overlaid(self.encoder, self.case.size) if self.case.same else Coarsest(self.encoder)
        width, self.pool = getattr(self.backbone, "channels", self.encoder.channels[-1]), nn.AdaptiveAvgPool2d(1)
        self.head, self.cell_head = DenseCLProjectionHead(width, 512, 128), DenseCLProjectionHead(width, 512, 128)
        self.slow = nn.ModuleList(slow(self.backbone, self.head, self.cell_head))
        self.pairs = list(zip((self.backbone, self.head, self.cell_head), self.slow))
        self.criteria = nn.ModuleList(NTXentLoss(memory_bank_size=(SAME_DENSECL["queue"] if self.case.same else 4096, 128)) for _ in range(2))

    def transform(self): return DenseCLTransform(input_size=self.case.size, normalize=self.norm)

    def see(self, x, backbone, head, cell_head):
        "Cells of the map (B, T, C), projection of the whole (B, D) and of the cells (B, T, D)."
        cells = backbone(x)
        whole = head(self.pool(cells).flatten(1))
        cells = cells.flatten(2).permute(0, 2, 1)
        return cells, whole, cell_head(cells)

    def one_way(self, query, key):
        "The example's step: one view asks, the other holds the keys."
        cells, q, q_cells = self.see(query, self.backbone, self.head, self.cell_head)
        with torch.no_grad(): key_cells, k, k_cells = self.see(key, *self.slow)
        k_cells = utils.select_most_similar(cells, key_cells, k_cells)
        return .5 * (self.criteria[0](q, k) + self.criteria[1](q_cells.flatten(end_dim=1), k_cells.flatten(end_dim=1)))

    def forward(self, views, epoch):
        ways = [views, views[::-1]] if self.case.same else [views]
        return sum(self.one_way(*way) for way in ways) / len(ways)


class MAE(Recipe):
    optimizer = staticmethod(lambda model: torch.optim.AdamW(model.parameters(), lr=1.5e-4))

    def build(self, width):
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
        decoder, patch, self.grid = SAME_MAE["decoder"], self.encoder.patch, self.case.size // self.encoder.patch
        self.backbone, self.narrow = Tokens(self.encoder), nn.Linear(width, decoder)
        self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches=self.grid ** 2, embed_dim=decoder, depth=SAME_MAE["depth"], num_heads=16)
        self.pixels, self.criterion = nn.Linear(decoder, patch ** 2 * self.case.channels), nn.MSELoss()

    def transform(self): return MAETransform(input_size=self.case.size, normalize=self.norm)

    def forward(self, views, epoch):
        x, length = views[0], self.grid ** 2 + 1
        keep, mask = utils.random_token_mask((len(x), length), SAME_MAE["ratio"], device=x.device)
        keep = keep.sort(1).values                                                   # our ViT returns tokens in this order
        hidden = torch.zeros(len(x), length, dtype=torch.bool).scatter(1, mask, True)[:, 1:].reshape(len(x), self.grid, self.grid)
        seen = self.narrow(self.backbone(x, hidden))
        full = utils.set_at_index(seen.new_zeros(len(x), length, seen.shape[-1]), keep, seen)
        predicted = self.pixels(utils.get_at_index(self.decoder(full, idx_mask=mask), mask))
        patches = utils.patchify(x, self.encoder.patch)
        return self.criterion(predicted, utils.get_at_index(patches, mask - 1))


RECIPES = {"simclr": SimCLR, "byol": BYOL, "dino": DINO, "densecl": DenseCL, "mae": MAE}


class Lightly:
    "The example's loop, as it is or with bf16 and a layout of pictures and weights; one epoch per call."
    def __init__(self, case: Case, workers: int, bf16: bool = False, layout: torch.memory_format = torch.contiguous_format):
        self.case, self.bf16, self.layout, self.epoch = case, bf16, layout, 0
        self.model = RECIPES[case.objective](case).train().to(memory_format=layout)
        self.optimizer = self.model.optimizer(self.model)
        self.loader = loader(Pictures(pictures(case.size, case.channels), self.model.transform()), case, workers)

    def step(self, views):
        self.model.follow(self.epoch)
        views = [v.to(memory_format=self.layout) for v in views]
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext(): loss = self.model(views, self.epoch)
        loss.backward()
        self.model.before_update(self.epoch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def __call__(self) -> int:
        self.total = sum(self.step(views) for views, _ in self.loader)
        self.epoch += 1
        return self.case.steps * self.case.batch

    def close(self): self.loader = self.model = self.optimizer = None
