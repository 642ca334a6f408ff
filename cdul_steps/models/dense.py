"""Dense views: all views of an image from one pass of the tower over the whole image at twice its
input size.

A tower's last feature map has one cell for each small part of the image. A view is the mean of the
cells that it covers, passed through the layers after the tower's own pooling. This is exact if the
tower pools with a mean. If it pools with attention, each cell uses its own value, as in MaskCLIP
(Zhou et al., 2022), and the whole image keeps the tower's own embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor
from torch.nn import functional

from cdul_steps.config import Encoder
from cdul_steps.errors import UserError
from cdul_steps.method.snippets import Grid, view_cells
from cdul_steps.models.encoder import ImageEncoder, Preprocess, load_clip
from cdul_steps.models.timm_encoder import TOGETHER

SCALE = 2
"""Width and height of the input, as multiples of the tower's own."""
EQUAL_WITHIN = 1e-3
"""Largest difference between unit vectors' entries for pooling to count as a mean of the cells."""

Dense = Callable[[Any, Tensor, Tensor], Tensor]
"""From a tower, images (B, 3, H, W) and cells of views (V, h * w) to embeddings (B, V, D)."""


def new_encoder(
    network: torch.nn.Module,
    settings: Encoder,
    device: torch.device,
    grids: Sequence[Grid],
    overlap: float,
) -> ImageEncoder:
    """The image tower of an encoder, for crops or for whole images, depending on its settings.

    Raises UserError as `DenseEncoder` does.
    """
    if settings.views == "dense":
        return DenseEncoder(network, settings.precision, device, grids, overlap)
    return ImageEncoder(network, settings.precision, device)


def load_tower(
    settings: Encoder, device: torch.device, grids: Sequence[Grid], overlap: float
) -> tuple[torch.nn.Module, ImageEncoder]:
    """An encoder's CLIP, and its image tower.

    Raises UserError as `load_clip` and `new_encoder` do.
    """
    network = load_clip(
        settings.model,
        settings.pretrained,
        precision=settings.precision,
        resize_mode=settings.resize_mode,
        device=device,
    )
    return network, new_encoder(network, settings, device, grids, overlap)


def passes(settings: Encoder, views: int) -> tuple[int, int]:
    """The number of tower passes for an image with this many views, and the number of images that
    a CPU worker processes together."""
    return (1, TOGETHER) if settings.views == "dense" else (views, 1)


class DenseEncoder(ImageEncoder):
    """An image tower that maps whole images to the embeddings of all their views, (B, V, D)."""

    def __init__(
        self,
        network: torch.nn.Module,
        precision: str,
        device: torch.device,
        grids: Sequence[Grid],
        overlap: float,
    ) -> None:
        """`grids` and `overlap` as in `view_boxes`. Raises UserError for a tower without cells."""
        super().__init__(network, precision, device)
        self.preprocess = Preprocess.of(network, scale=SCALE)
        self.network = _DenseTower(network.visual, self.preprocess.size, grids, overlap)
        self.network.to(device, memory_format=torch.channels_last)


class _DenseTower(torch.nn.Module):
    """Has the interface of an image tower, with an additional axis for the views."""

    def __init__(
        self,
        visual: torch.nn.Module,
        size: tuple[int, int],
        grids: Sequence[Grid],
        overlap: float,
    ) -> None:
        super().__init__()
        self.visual = visual
        weight = next(visual.parameters())
        noise = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(0)).to(weight)
        with torch.inference_mode():
            self.dense, rows, columns = _dense(visual, noise)
            cells = torch.from_numpy(view_cells(rows, columns, grids, overlap))
            self.register_buffer("cells", cells.to(weight))
            embedded = functional.normalize(self.encode_image(noise)[:, 0].float(), dim=-1)
            own = functional.normalize(visual(noise).float(), dim=-1)
        if (embedded - own).abs().max() > EQUAL_WITHIN:
            raise UserError(
                "encoder: views: dense is for towers that pool with a mean or with attention; this "
                f"{type(visual).__name__} does not: use views: crops"
            )

    def encode_image(self, images: Tensor) -> Tensor:
        return self.dense(self.visual, images, self.cells)


def _dense(visual: torch.nn.Module, images: Tensor) -> tuple[Dense, int, int]:
    """The function of a tower, and the rows and columns of its cells for images of this size.

    Position embeddings of the tower, if any, are resized to these cells.
    """
    if isinstance(visual, TimmModel):
        found = visual.trunk.forward_features(images)
        if found.ndim == 4 and found.shape[1] == visual.trunk.num_features:
            return _convolutional, found.shape[2], found.shape[3]
    if isinstance(visual, ModifiedResNet):
        rows, columns = (side // 32 for side in images.shape[2:])
        _resize_positions(visual.attnpool, rows, columns)
        return _attention_pooled, rows, columns
    if (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
    ):
        rows, columns = (
            side // patch for side, patch in zip(images.shape[2:], visual.patch_size, strict=True)
        )
        _resize_positions(visual, rows, columns)
        return _transformer, rows, columns
    raise UserError(
        f"encoder: views: dense does not support this tower ({type(visual).__name__}): use "
        "views: crops"
    )


def _resize_positions(layer: torch.nn.Module, rows: int, columns: int) -> None:
    """Resize a layer's position embeddings from its own n * n square to these cells.

    Its embeddings are (1 + n * n, C); the first belongs to another token.
    """
    positions = layer.positional_embedding
    first, cells = positions[:1], positions[1:]
    side = round(len(cells) ** 0.5)
    grid = cells.T.reshape(1, -1, side, side).float()
    grid = functional.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
    cells = grid.flatten(2)[0].T.to(positions.dtype)
    resized = torch.cat([first, cells])
    layer.positional_embedding = torch.nn.Parameter(resized, requires_grad=False)


def _convolutional(visual: TimmModel, images: Tensor, cells: Tensor) -> Tensor:
    """A timm network that pools its last feature map with a mean."""
    found = visual.trunk.forward_features(images)
    pooled = cells @ found.flatten(2).transpose(1, 2)
    pooled = pooled.reshape(-1, pooled.shape[2], 1, 1)
    vectors = visual.head(visual.trunk.forward_head(pooled))
    return vectors.reshape(-1, len(cells), vectors.shape[-1])


def _attention_pooled(visual: ModifiedResNet, images: Tensor, cells: Tensor) -> Tensor:
    """A ResNet of CLIP, which pools with an attention layer."""
    found = visual.forward_intermediates(images, indices=1)
    pooled = cells[1:] @ found["image_intermediates"][0].flatten(2).transpose(1, 2)
    snippets = visual.attnpool.c_proj(visual.attnpool.v_proj(pooled))
    return torch.cat([found["image_features"][:, None], snippets], dim=1)


def _transformer(visual: VisionTransformer, images: Tensor, cells: Tensor) -> Tensor:
    """A vision transformer; in its last block each cell attends to itself."""
    found = visual.forward_intermediates(images, indices=2, output_fmt="NLC")
    tokens = found["image_intermediates"][0]
    block = visual.transformer.resblocks[-1]
    attention = block.attn
    value = slice(2 * attention.embed_dim, None)
    values = functional.linear(
        block.ln_1(tokens), attention.in_proj_weight[value], attention.in_proj_bias[value]
    )
    tokens = tokens + block.ls_1(attention.out_proj(values))
    tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    pooled = cells[1:] @ visual.ln_post(tokens)
    snippets = pooled if visual.proj is None else pooled @ visual.proj
    return torch.cat([found["image_features"][:, None], snippets], dim=1)
