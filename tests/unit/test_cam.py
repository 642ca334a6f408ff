"""Class activation maps: their layer and their values."""

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import interpolate

from cdul_steps.models.cam import class_maps, map_shape

TRANSFORMERS = {
    "test_vit": {},
    # The channels of its maps come last.
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 1),
    },
}


def network(name: str, **arguments) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, **arguments).eval()


def images(size: int = 64, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_network_with_a_mean_and_a_linear_head_gives_its_class_activation_map():
    """CAM (Zhou et al., 2016): the features weighted by the head's weights, its gradient."""
    resnet, inputs, classes = network("test_resnet"), images(96), [4, 0, 2]
    with torch.no_grad():
        features = resnet.forward_features(inputs)
        weights = resnet.get_classifier().weight[classes]
        expected = torch.einsum("bk,bkhw->bhw", weights, features).clamp(min=0)
    assert min(features.shape[2:]) > 1 and expected.amax() > 0
    expected = interpolate(expected[:, None], (96, 96), mode="bilinear")[:, 0].numpy()
    found = np.stack(
        [class_maps(resnet, i[None], [c])[0] for i, c in zip(inputs, classes, strict=True)]
    )
    assert found.shape == (3, 96, 96) and found.dtype == np.float32
    for map_, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(map_, wanted / max(wanted.max(), 1e-12), atol=1e-5)
        assert map_.max() == pytest.approx(1, abs=1e-6) or not wanted.any()


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_byobnet", "test_convnext", "resnet10t"]
)
def test_networks_with_a_map_of_features(name):
    found = class_maps(network(name), images(count=1), [0, 1, 2])
    assert found.shape == (3, 64, 64)
    assert found.min() >= 0 and found.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("name", "arguments"), TRANSFORMERS.items())
def test_networks_without_one_say_so(name, arguments):
    size = arguments.get("img_size", 160)
    with pytest.raises(ValueError, match="no feature map"):
        class_maps(network(name, **arguments), images(size, 1), [0])


def test_features_of_one_point_are_no_map():
    resnet = network("resnet10t")
    assert map_shape(resnet, images(64, 1)) == (resnet.num_features, 2, 2)
    assert map_shape(resnet, images(32, 1)) is None


def test_the_network_is_left_as_it_was():
    resnet = network("test_resnet")
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    class_maps(resnet, images(count=1), [0, 1, 2])
    assert not resnet.training
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())
    assert not any(m._forward_hooks for m in resnet.modules())
