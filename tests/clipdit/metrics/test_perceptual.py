"""ST-LPIPS gives the numbers of the package whose weights it reads; LPIPS those of its own package."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tvf
from waves import picture

from clipdit.metrics import weights
from clipdit.metrics.perceptual import LPIPS, STLPIPS, lpips_trunk_file
from clipdit.metrics.weights import MissingWeights


@pytest.fixture(scope="module")
def st_lpips() -> STLPIPS:
    return STLPIPS()


def test_st_lpips_agrees_with_its_package(st_lpips):
    # 0.17389916 is what stlpips-pytorch 0.0.2 itself returns for these two pictures (net="alex", variant="shift_tolerant")
    assert st_lpips(picture(0.0), picture(1.0)).item() == pytest.approx(0.17389916, abs=1e-6)


def test_equal_images_are_at_no_distance_and_order_does_not_matter(st_lpips):
    a, b = picture(0.0), picture(1.0)
    assert st_lpips(a, a).item() == 0
    assert st_lpips(a, b).item() == pytest.approx(st_lpips(b, a).item(), rel=1e-6)


def test_more_noise_and_more_blur_are_farther(st_lpips):
    image, noise = picture(0.0), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = [st_lpips(image + s * noise, image).item() for s in (0.02, 0.1, 0.4)]
    blurred = [st_lpips(tvf.gaussian_blur(image, [9, 9], [s, s]), image).item() for s in (0.5, 1.0, 2.0)]
    assert noisy == sorted(noisy)
    assert blurred == sorted(blurred)


def test_an_image_is_judged_alone(st_lpips):
    a, b = torch.cat([picture(0.0), picture(2.0)]), torch.cat([picture(1.0), picture(5.0)])
    alone = torch.cat([st_lpips(a[:1], b[:1]), st_lpips(a[1:], b[1:])])
    assert torch.allclose(st_lpips(a, b), alone, rtol=1e-5)


def test_embeddings_are_at_the_same_distance(st_lpips):
    a, b = picture(0.0), picture(1.0)
    embedded = (st_lpips.embed(a) - st_lpips.embed(b)).square().sum().item()
    assert embedded == pytest.approx(st_lpips(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("start", [picture(0.0), torch.full((1, 3, 64, 64), -1.0)], ids=["picture", "black"])
def test_gradients_reach_the_image_and_not_the_network(st_lpips, start):
    image = start.clone().requires_grad_()
    st_lpips(image, picture(1.0)).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().max() > 0
    assert all(not parameter.requires_grad for parameter in st_lpips.parameters())


def test_small_images_are_refused(st_lpips):
    with pytest.raises(ValueError, match="16 x 16; perceptual distances need 32 px"):
        st_lpips(picture(0.0, 16), picture(1.0, 16))


def test_missing_damaged_and_foreign_weights_are_named(tmp_path, monkeypatch):
    damaged, foreign = tmp_path / "damaged.pth", tmp_path / "foreign.pth"
    damaged.write_bytes(b"PK\x03\x04 no archive")
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match=r"damaged\.pth is not a readable weights file"):
        STLPIPS(damaged)
    with pytest.raises(ValueError, match=r"foreign\.pth does not hold the weights of ST-LPIPS"):
        STLPIPS(foreign)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r'ST-LPIPS needs .* pip install "clipdit\[metrics\]"'):
        STLPIPS()


def test_code_hidden_in_a_weights_file_is_not_run(tmp_path):
    class Hidden:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"net.slice1.0.weight": Hidden()}, tmp_path / "hidden.pth")
    with pytest.raises(ValueError, match="not a readable weights file"):
        STLPIPS(tmp_path / "hidden.pth")


@pytest.fixture
def trunk() -> dict[str, torch.Tensor]:
    """A small random trunk under torchvision's names."""
    random = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    return {
        f"features.{layer}.{kind}": torch.randn(shape, generator=random) * 0.05
        for layer, (out, into, kernel) in shapes.items()
        for kind, shape in (("weight", (out, into, kernel, kernel)), ("bias", (out,)))
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # the package calls torchvision in an old-fashioned way
def test_lpips_agrees_with_its_package_on_any_trunk(tmp_path, trunk, monkeypatch):
    lpips = pytest.importorskip("lpips", reason="in the extra `metrics`")
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda x, **_: x)  # 61 million numbers that nobody needs
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in reference.net.state_dict()}
    reference.net.load_state_dict({name: trunk[theirs] for name, theirs in names.items()})
    torch.save(trunk, tmp_path / "trunk.pth")
    a, b = torch.cat([picture(0.0), picture(2.0)]), torch.cat([picture(1.0), picture(5.0)])
    assert torch.allclose(LPIPS(tmp_path / "trunk.pth")(a, b), reference(a, b).flatten(), rtol=1e-4)


def test_a_file_that_is_no_trunk_is_named(tmp_path, trunk):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    torch.save(trunk | {"features.3.weight": torch.zeros(192, 64, 3, 3)}, tmp_path / "other.pth")
    for name in ("foreign.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights of torchvision's AlexNet"):
            LPIPS(tmp_path / name)


def test_lpips_without_its_trunk_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingWeights) as missing:
        LPIPS()
    assert str(lpips_trunk_file()) in str(missing.value)
    assert "\n" not in str(missing.value)
