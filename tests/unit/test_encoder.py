"""The encoder: which CLIP it loads, and that its vectors equal open_clip's."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file

from cdul_steps.errors import UserError
from cdul_steps.method.similarity import class_embedding, unit
from cdul_steps.models.encoder import (
    ImageEncoder,
    Preprocess,
    TextEncoder,
    load_clip,
    logit_facts,
    logit_scale,
)

NAME = "tiny-test-clip"
QUICK = "tiny-test-clip-quickgelu"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny.make_clip(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """The tiny model, registered under a name in open_clip."""
    configs = tmp_path_factory.mktemp("configs")
    (configs / f"{NAME}.json").write_text(json.dumps(tiny.CLIP))
    (configs / f"{QUICK}.json").write_text(json.dumps({**tiny.CLIP, "quick_gelu": True}))
    open_clip.add_model_config(configs)


@pytest.fixture
def tags(monkeypatch):
    """Tags of the registered model; one is for weights that need OpenAI's activation."""
    tags = {
        "plain": {"hf_hub": "example/plain/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        "quick_one": {"hf_hub": "example/quick/", "quick_gelu": True},
        "named": {"hf_hub": "example/named/weights.bin"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repository: str, file: Path) -> None:
    revision = "0123456789abcdef" * 2 + "01234567"
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(revision)
    (place / "snapshots" / revision).mkdir(parents=True)
    shutil.copy(file, place / "snapshots" / revision / file.name)


def pixels(count: int) -> torch.Tensor:
    random = np.random.default_rng(1)
    return torch.from_numpy(random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def encode(network: torch.nn.Module, precision: str = "fp32") -> np.ndarray:
    return unit(ImageEncoder(network, precision, CPU)(pixels(4)))


def fails(model: str, pretrained: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_clip(model, pretrained)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_local_dir(folder):
    network = load_clip(f"local-dir:{folder}")
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    weights = load_file(folder / tiny.WEIGHTS)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


def test_name_with_checkpoint_file(folder):
    by_file = load_clip(NAME, str(folder / tiny.WEIGHTS))
    np.testing.assert_allclose(
        by_file.encode_text(torch.ones(1, 16, dtype=torch.long)),
        load_clip(f"local-dir:{folder}").encode_text(torch.ones(1, 16, dtype=torch.long)),
    )


@pytest.mark.parametrize("tag", ["quick_one", "quick-one", "Quick-One"])
def test_tag_from_an_offline_cache(folder, tags, cache, tag):
    put(cache, "example/quick", folder / tiny.WEIGHTS)
    network = load_clip(NAME, tag)
    weights = load_file(folder / tiny.WEIGHTS)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


def test_tag_brings_its_preprocessing(folder, tags, cache):
    put(cache, "example/plain", folder / tiny.WEIGHTS)
    preprocess = Preprocess.of(load_clip(NAME, "plain"))
    assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_activation_is_the_tags(folder, tags, cache):
    put(cache, "example/plain", folder / tiny.WEIGHTS)
    put(cache, "example/quick", folder / tiny.WEIGHTS)
    plain, quick = load_clip(NAME, "plain"), load_clip(NAME, "quick_one")
    by_name = load_clip(QUICK, str(folder / tiny.WEIGHTS))
    assert not any(isinstance(m, QuickGELU) for m in plain.modules())
    assert any(isinstance(m, QuickGELU) for m in quick.modules())
    prompt = open_clip.get_tokenizer(NAME)(["a cat"])
    assert torch.equal(quick.encode_text(prompt), by_name.encode_text(prompt))
    assert not torch.allclose(quick.encode_text(prompt), plain.encode_text(prompt))


def test_openai_tags_need_their_activation():
    assert open_clip.get_pretrained_cfg("RN50x64", "openai")["quick_gelu"]


def test_no_cache_and_no_network(tags, cache, caplog):
    message = fails(NAME, "quick_one")
    for part in (
        "example/quick/open_clip_model.safetensors",
        str(cache),
        "'pretrained'",
        f"of the model {QUICK}",
        "local-dir:FOLDER",
    ):
        assert part in message
    assert "-quickgelu" not in fails(NAME, "plain")
    assert "example/named/weights.bin is not" in fails(NAME, "named")
    # The command line prints the one line of the error and nothing else.
    assert caplog.text == ""


def test_cached_file_that_does_not_fit_is_not_called_missing(folder, tags, cache, tmp_path):
    weights = load_file(folder / tiny.WEIGHTS)
    weights.pop("visual.proj")
    save_file(weights, tmp_path / tiny.WEIGHTS)
    put(cache, "example/plain", tmp_path / tiny.WEIGHTS)
    message = fails(NAME, "plain")
    assert "not in the cache" not in message
    assert "cannot be loaded" in message


def test_unknown_names(tags):
    assert f"similar: {NAME}" in fails("tiny-test-clap", "plain")
    assert "no such model" in fails("xyz", "plain")
    message = fails(NAME, "openai")
    assert "'openai' is neither a file nor one of open_clip's tags (plain, quick_one" in message
    assert "'pretrained' is missing" in fails(NAME)


@pytest.mark.parametrize("model", ["local-dir:somewhere", "hf-hub:org/name"])
def test_places_with_their_own_weights_take_no_tag(model):
    assert "remove 'pretrained'" in fails(model, "openai")


def test_hub_repository_that_cannot_be_fetched(cache):
    assert "encoder hf-hub:org/name: " in fails("hf-hub:org/name")


def test_local_dir_that_is_not_one(folder, tmp_path):
    assert "not found" in fails(f"local-dir:{tmp_path / 'nowhere'}")
    assert "open_clip_config.json" in fails(f"local-dir:{tmp_path}")
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    assert "could not be loaded" in fails(f"local-dir:{tmp_path}")


def test_torn_checkpoint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "torn")
    whole = (folder / tiny.WEIGHTS).read_bytes()
    (tmp_path / "torn" / tiny.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in fails(f"local-dir:{tmp_path / 'torn'}")


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_wrong_checkpoint(folder, tmp_path, kind):
    weights = load_file(folder / tiny.WEIGHTS)
    if kind == "missing":
        weights.pop("visual.proj")
    elif kind == "extra":
        weights["visual.extra"] = torch.zeros(2)
    else:
        weights["visual.proj"] = torch.zeros(64, 8)
    save_file(weights, tmp_path / "wrong.safetensors")
    assert "cannot be loaded" in fails(NAME, str(tmp_path / "wrong.safetensors"))


def test_logit_scale_is_the_exponential(folder):
    network = load_clip(f"local-dir:{folder}")
    network.logit_scale.fill_(math.log(100))
    assert logit_scale(network) == pytest.approx(100, rel=1e-5)
    assert logit_facts(network) == {"logit_scale": logit_scale(network)}


def test_a_siglip_has_a_bias(tmp_path):
    facts = logit_facts(load_clip(tiny.make_siglip(tmp_path / "siglip"), precision="bf16"))
    assert facts == {"logit_scale": pytest.approx(10, rel=2e-2), "logit_bias": -10}


WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "dog", "cat"]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer as in SigLIP's repositories: whole words, an end token, padding."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: place for place, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    made.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_of_a_hub_in_the_folder(tmp_path, cache):
    pytest.importorskip("transformers")
    model = tiny.make_siglip(
        tmp_path / "siglip",
        context_length=64,
        vocab_size=len(WORDS),
        hf_tokenizer_name="example/siglip",
        tokenizer_kwargs={"clean": "canonicalize"},
    )
    network = load_clip(model)
    with pytest.raises(UserError, match=r"needs tokenizer.json and tokenizer_config.json in .*sig"):
        TextEncoder(network, model)
    write_tokenizer(tmp_path / "siglip")
    encoder = TextEncoder(network, model)
    prompts = ["A photo of a DOG.", "a cat", "a bird"]
    tokens = torch.zeros(3, 64, dtype=torch.long)
    for row, words in zip(tokens, ([3, 4, 5, 3, 6, 1], [3, 7, 1], [3, 2, 1]), strict=True):
        row[: len(words)] = torch.tensor(words)
    assert torch.equal(encoder.tokenize(prompts), tokens)
    np.testing.assert_array_equal(encoder(prompts), network.encode_text(tokens))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash", None])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (20, 20)])
def test_preprocessing_is_open_clips(folder, tmp_path, mode, size):
    model = f"local-dir:{folder}"
    preprocess = Preprocess.of(load_clip(model, resize_mode=mode))
    *_, transform = open_clip.create_model_and_transforms(model, image_resize_mode=mode)
    image = Image.open(tiny.noise(tmp_path / "a.png", 3, size)).convert("RGB")
    box = (3, 2, size[0] - 1, size[1] - 4)
    view = torch.from_numpy(preprocess.views(image, np.array([box])))
    assert view.shape == (1, 3, 32, 32)
    ours = preprocess.normalize(view, torch.float32)[0]
    np.testing.assert_allclose(ours, transform(image.crop(box)), rtol=0, atol=1e-6)


def test_class_embedding_averages_unit_vectors(folder):
    model = f"local-dir:{folder}"
    network = load_clip(model)
    prompts = ["a photo of a cat", "a cat", "a drawing of a kitten"]
    tokens = open_clip.get_tokenizer(model)(prompts)
    vectors = network.encode_text(tokens).double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = vectors.mean(axis=0)
    found = class_embedding(TextEncoder(network, model)(prompts))
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_vectors_do_not_depend_on_the_batch(folder):
    encoder = ImageEncoder(load_clip(f"local-dir:{folder}"), "fp32", CPU)
    views = pixels(7)
    together = unit(encoder(views))
    assert np.abs(together @ together.T - np.eye(7)).max() < 0.99
    for size in (1, 3):
        apart = unit(np.concatenate([encoder(part) for part in views.split(size)]))
        assert (apart * together).sum(axis=1).min() >= 0.99999


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_close(folder, precision):
    full = encode(load_clip(f"local-dir:{folder}"))
    half = encode(load_clip(f"local-dir:{folder}", precision=precision), precision)
    assert half.dtype == np.float32
    assert (half * full).sum(axis=1).min() >= 0.999
