"""The demo: its scenes match their table, and its tiny CLIP can label them."""

import csv
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score

from cdul_steps.demo import scenes, train_clip
from cdul_steps.demo.scenes import CLASSES, scene, write_scenes
from cdul_steps.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = Path(train_clip.__file__).parent / "tiny-clip"


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "scenes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clip():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{FOLDER}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, seed=3, train=6, test=4, processes=2)
    return folder


def test_class_list_of_the_config_is_that_of_the_scenes():
    names = yaml.safe_load((ROOT / "config/classes/demo.yaml").read_text())
    assert tuple(names) == CLASSES


def test_same_seed_same_bytes_and_fewer_scenes_are_a_prefix(small, tmp_path):
    write_scenes(tmp_path, seed=3, train=6, test=2, processes=1)
    rows = read(tmp_path)
    assert rows == read(small)[:8]
    for row in rows:
        assert (tmp_path / row["path"]).read_bytes() == (small / row["path"]).read_bytes()


def test_another_seed_gives_other_scenes(small, tmp_path):
    write_scenes(tmp_path, seed=4, train=1, test=0, processes=1)
    assert (tmp_path / "train/000000.jpg").read_bytes() != (small / "train/000000.jpg").read_bytes()


def test_table_and_pictures_agree(small):
    rows = read(small)
    assert list(rows[0]) == ["path", "split", *CLASSES]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 4
    files = {p.relative_to(small).as_posix() for p in small.rglob("*.*")}
    assert files == {"scenes.csv"} | {row["path"] for row in rows}
    for row in rows:
        with Image.open(small / row["path"]) as image:
            assert (image.size, image.mode) == ((192, 192), "RGB")
        assert {row[name] for name in CLASSES} <= {"0", "1"}
        assert any(row[name] == "1" for name in CLASSES)


def test_labelled_classes_are_those_drawn(monkeypatch):
    draw, drawn = scenes.draw_object, []

    def spy(name, diameter, rng):
        thing, colour = draw(name, diameter, rng)
        drawn.append((name, np.asarray(thing)))
        return thing, colour

    monkeypatch.setattr(scenes, "draw_object", spy)
    for k in range(30):
        drawn.clear()
        picture, labels = scene(128, np.random.default_rng(k))
        labelled = {CLASSES[c] for c in np.flatnonzero(labels)}
        names = [name for name, _ in drawn]
        # The last object is left out if there is no place for it.
        assert labelled in ({*names}, {*names[:-1]})
        seen = {tuple(p) for p in np.asarray(picture).reshape(-1, 3).tolist()}
        for name, thing in drawn:
            if name in labelled and names.count(name) == 1:
                solid = {tuple(p) for p in thing[thing[..., 3] == 255][:, :3].tolist()}
                assert solid & seen, name


def test_impossible_requests_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="-1 train"):
        write_scenes(tmp_path, seed=0, train=-1, test=1)
    with pytest.raises(UserError, match="0 steps"):
        train_clip.train_clip(tmp_path, seed=0, steps=0)


def test_tiny_clip_is_small_and_complete():
    names = {"open_clip_config.json", "open_clip_model.safetensors"}
    assert {p.name for p in FOLDER.iterdir()} == names
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8_000_000


def test_tiny_clip_knows_single_objects(clip):
    model, _, tokenizer = clip
    assert 10 < model.logit_scale.exp().item() < 100.1
    pictures, _ = train_clip.draw_groups(30, seed=987)
    assert train_clip.zero_shot_accuracy(model, tokenizer, pictures) >= 0.9


def test_snippets_find_what_the_whole_image_misses(clip):
    model, preprocess, tokenizer = clip
    views, truth = [], []
    for k in range(200):
        picture, labels = scene(192, np.random.default_rng([55, k]))
        cuts = [(c, r, c + 64, r + 64) for r in (0, 64, 128) for c in (0, 64, 128)]
        views += [preprocess(picture), *(preprocess(picture.crop(cut)) for cut in cuts)]
        truth.append(labels)
    prompts = tokenizer([train_clip.PROMPT.format(name) for name in CLASSES])
    with torch.inference_mode():
        text = model.encode_text(prompts, normalize=True)
        image = torch.cat(
            [
                model.encode_image(torch.stack(views[k : k + 50]), normalize=True)
                for k in range(0, len(views), 50)
            ]
        )
        scores = (model.logit_scale.exp() * image @ text.T).softmax(1).view(200, 10, -1).numpy()
    whole, local = scores[:, 0], scores[:, 1:].max(1)
    mean_ap = [average_precision_score(np.array(truth), y) for y in (whole, (whole + local) / 2)]
    assert mean_ap[1] >= mean_ap[0] + 0.1


def test_training_repeats_itself(tmp_path):
    for name in ("a", "b"):
        train_clip.train_clip(tmp_path / name, seed=1, steps=2)
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / name}")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
