"""Dense views: each tower's embeddings, compared with results from its own layers."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from encode_runs import DIMENSION, SHARD, VIEWS, cosines, make_data, run, statuses
from hypothesis import given
from hypothesis import strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch.nn import functional

from cdul_steps.data.manifest import read_shard
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.method.snippets import view_boxes, view_cells
from cdul_steps.models.dense import DenseEncoder
from cdul_steps.models.encoder import load_clip

GRIDS, OVERLAP = [(2, 3), (2, 2)], 0.25
SIDE = 64
"""Side of the towers' own input; dense views use images of twice this size."""


class Clip(torch.nn.Module):
    """The parts of a CLIP model that `DenseEncoder` needs."""

    def __init__(self, visual: torch.nn.Module) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        visual.image_size = SIDE
        visual.preprocess_cfg = {"size": SIDE, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def made(kind: str) -> torch.nn.Module:
    """A tower with random weights."""
    torch.manual_seed(0)
    if kind == "resnet":
        visual = ModifiedResNet([1, 1, 1, 1], output_dim=24, heads=4, image_size=SIDE, width=8)
        # In a new network, the blocks do not change their input.
        for name, parameter in visual.named_parameters():
            if name.endswith("bn3.weight"):
                torch.nn.init.ones_(parameter)
        return visual
    if kind.startswith("transformer"):
        options = {"pool_type": "avg"} if kind == "transformer-avg" else {}
        return VisionTransformer(SIDE, 16, 48, 3, 4, 2.0, output_dim=24, **options)
    return TimmModel(kind, 24, image_size=SIDE, pool="avg", proj="linear")


KINDS = ("test_byobnet", "test_convnext", "resnet", "transformer")


def dense(kind: str) -> tuple[torch.nn.Module, DenseEncoder]:
    """An unchanged tower, and its dense encoder."""
    encoder = DenseEncoder(Clip(made(kind)), "fp32", torch.device("cpu"), GRIDS, OVERLAP)
    return made(kind).eval(), encoder


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 3, 2 * SIDE, 2 * SIDE)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def mean_over(cells: torch.Tensor, box: np.ndarray, fine: int) -> torch.Tensor:
    """Mean (B, C) of a map (B, C, h, w) over a box of an image of `fine` x `fine` pixels."""
    repeats = fine // cells.shape[2], fine // cells.shape[3]
    image = cells.repeat_interleave(repeats[0], dim=2).repeat_interleave(repeats[1], dim=3)
    x0, y0, x1, y1 = box.tolist()
    return image[:, :, y0:y1, x0:x1].mean(dim=(2, 3))


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.floats(0, 0.9)
)
def test_a_view_is_all_of_its_cells(rows, columns, down, across, overlap):
    cells = view_cells(rows, columns, [(down, across)], overlap)
    assert cells.shape == (1 + down * across, rows * columns)
    assert cells.dtype == np.float32
    assert (cells >= 0).all()
    np.testing.assert_allclose(cells.sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(cells[0], 1 / (rows * columns), atol=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_snippets_that_tile_the_image_have_its_mean(rows, columns, down, across):
    cells = view_cells(rows, columns, [(down, across)])
    np.testing.assert_allclose(cells[1:].mean(axis=0), cells[0], atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_cells_are_those_of_the_pixels_that_a_view_has(rows, columns, seed):
    # Enough pixels for the views' corners and the cells' edges to lie between two of them.
    fine = 7 * rows * columns * 60
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns))
    weights = view_cells(rows, columns, [(3, 2)], 0.25)
    across = np.repeat(values, fine // columns, axis=1).cumsum(axis=1)
    boxes = view_boxes(fine, fine, [(3, 2)], 0.25)
    for box, found in zip(boxes, weights @ values.ravel(), strict=True):
        x0, y0, x1, y1 = box.tolist()
        lines = across[:, x1 - 1] - (across[:, x0 - 1] if x0 else 0)
        expected = np.repeat(lines, fine // rows)[y0:y1].sum() / ((x1 - x0) * (y1 - y0))
        assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_image_is_the_towers_own_embedding(kind):
    tower, encoder = dense(kind)
    found = encoder(pixels())
    assert found.shape == (3, 11, 24)
    if kind in ("resnet", "transformer"):
        return  # for another number of cells; the next tests cover the positions
    with torch.inference_mode():
        expected = tower(encoder.preprocess.normalize(pixels(), torch.float32)).numpy()
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-5)


def test_a_mean_pools_each_view_and_then_projects():
    tower, encoder = dense("test_byobnet")
    found = encoder(pixels())
    with torch.inference_mode():
        cells = tower.trunk.forward_features(encoder.preprocess.normalize(pixels(), torch.float32))
        # Enough pixels per cell that rounding the views' corners changes little.
        fine = cells.shape[2] * 105
        for view, box in enumerate(view_boxes(fine, fine, GRIDS, OVERLAP)):
            pooled = mean_over(cells, box, fine)
            expected = pooled @ tower.head.proj.weight.T
            np.testing.assert_allclose(found[:, view], expected, atol=2e-4)


def test_attention_pooling_gives_each_cell_its_own_value():
    tower, encoder = dense("resnet")
    found = encoder(pixels())
    images = encoder.preprocess.normalize(pixels(), torch.float32)
    with torch.inference_mode():
        cells = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
        pool, fine = tower.attnpool, cells.shape[2] * 105
        values = torch.einsum("bchw,dc->bdhw", cells, pool.v_proj.weight)
        values += pool.v_proj.bias[:, None, None]
        values = torch.einsum("bchw,dc->bdhw", values, pool.c_proj.weight)
        values += pool.c_proj.bias[:, None, None]
        for view, box in enumerate(view_boxes(fine, fine, GRIDS, OVERLAP)[1:], 1):
            expected = mean_over(values, box, fine)
            np.testing.assert_allclose(found[:, view], expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["transformer", "transformer-avg"])
def test_in_the_last_block_each_cell_attends_to_itself(kind):
    tower, encoder = dense(kind)
    found = encoder(pixels())
    images = encoder.preprocess.normalize(pixels(), torch.float32)
    side = 2 * SIDE // 16
    with torch.inference_mode():
        first, positions = tower.positional_embedding[:1], tower.positional_embedding[1:]
        grid = positions.reshape(SIDE // 16, SIDE // 16, -1).permute(2, 0, 1)[None]
        grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        positions = torch.cat([first, grid[0].flatten(1).T])
        patches = tower.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tower.class_embedding.expand(3, 1, -1), patches], dim=1) + positions
        tokens = tower.ln_pre(tokens)
        for block in tower.transformer.resblocks[:-1]:
            tokens = block(tokens)
        last = tower.transformer.resblocks[-1]
        own = tower.ln_post(last(tokens))
        own = own[:, 1:].mean(dim=1) if kind == "transformer-avg" else own[:, 0]
        np.testing.assert_allclose(found[:, 0], own @ tower.proj, atol=1e-4)
        alone = torch.full((side**2 + 1,) * 2, -torch.inf).fill_diagonal_(0)
        cells = tower.ln_post(last(tokens, attn_mask=alone))[:, 1:] @ tower.proj
        cells = cells.transpose(1, 2).reshape(3, -1, side, side)
        for view, box in enumerate(view_boxes(side * 105, side * 105, GRIDS, OVERLAP)[1:], 1):
            expected = mean_over(cells, box, side * 105)
            np.testing.assert_allclose(found[:, view], expected, atol=2e-4)


def test_other_towers_are_refused_in_one_line():
    attentional = VisionTransformer(SIDE, 16, 48, 2, 4, 2.0, output_dim=24, attentional_pool=True)
    with pytest.raises(UserError, match=r"dense does not support .*VisionTransformer.*crops"):
        DenseEncoder(Clip(attentional), "fp32", torch.device("cpu"), GRIDS, OVERLAP)
    patches = TimmModel("test_vit", 24, image_size=160, pool="token", proj="linear")
    with pytest.raises(UserError, match="dense does not support"):
        DenseEncoder(Clip(patches), "fp32", torch.device("cpu"), GRIDS, OVERLAP)
    maximum = TimmModel("test_byobnet", 24, image_size=SIDE, pool="max", proj="linear")
    with pytest.raises(UserError, match="does not: use views: crops"):
        DenseEncoder(Clip(maximum), "fp32", torch.device("cpu"), GRIDS, OVERLAP)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight images, one of them damaged, and their manifest with two shards."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    damaged = folder / "images/3.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    return folder


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_is_the_images_squashed_to_twice_the_size(data, tmp_path, engine, workers):
    model = tiny.make_clip(tmp_path / "clip")
    manifest = data / "manifest/train/0.parquet"
    rows, outcome = run(manifest, tmp_path, model, views="dense", engine=engine, workers=workers)
    assert rows.shape == (SHARD, VIEWS, DIMENSION)
    assert statuses(outcome).pop("3.png") == "truncated"
    assert np.isnan(rows[3]).all()
    assert read_facts(tmp_path / "0.parquet")["views"] == "dense"
    encoder = DenseEncoder(load_clip(model), "fp32", torch.device("cpu"), [(2, 2)], 0)
    _, images, _ = read_shard(manifest)
    for row in (0, 1, 2, 4):
        with Image.open(images["path"][row].as_py()) as image:
            squashed = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        views = torch.from_numpy(np.asarray(squashed).transpose(2, 0, 1).copy())[None]
        assert cosines(rows[row], encoder(views)[0]).min() > 0.999
    # The views of an image differ, and so do the images.
    assert cosines(rows[0, 1], rows[0, 4]) < 0.999
    assert cosines(rows[0, 0], rows[1, 0]) < 0.999
