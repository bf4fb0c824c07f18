"""What users would call a failure is counted, and what they would not is not."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from clipdit.metrics.failures import Appearance, failures


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """Coloured discs on white, (40, 3, 48, 48)."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    images = torch.full((40, 3, 48, 48), 255, dtype=torch.uint8)
    for image in images:
        colour = torch.randint(0, 160, (3, 1), dtype=torch.uint8, generator=random)
        colour[int(torch.randint(3, (), generator=random))] = 220
        centre = torch.randint(18, 30, (2,), generator=random)
        image[:, (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 16**2] = colour
    return images


SPOILED = {
    "black": lambda x: x * 0 + 3,
    "near_constant": lambda x: x * 0 + 128,
    "washed_out": lambda x: (x.float() * 0.2 + 190).to(torch.uint8),
    "blurred": lambda x: tvf.gaussian_blur(x, [15, 15], [3.0, 3.0]),
    "grey": lambda x: tvf.rgb_to_grayscale(x, 3),
    "colour_off": lambda x: (x.float() * torch.tensor([0.3, 1.0, 0.3])[:, None, None]).to(torch.uint8),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_set_is_counted_under_its_name(real, kind):
    reference, own = Appearance.of(real[:20]), Appearance.of(real[20:])
    found = failures(Appearance.of(SPOILED[kind](real[20:])), reference, own)
    assert found[kind].all()


def test_real_images_do_not_fail(real):
    own = Appearance.of(real[20:])
    found = failures(own, Appearance.of(real[:20]), own)
    assert {kind: int(flags.sum()) for kind, flags in found.items()} == dict.fromkeys(SPOILED, 0)


def test_a_grey_output_of_a_grey_target_is_no_failure(real):
    grey = tvf.rgb_to_grayscale(real[20:], 3)
    assert not failures(Appearance.of(grey), Appearance.of(real[:20]), Appearance.of(grey))["grey"].any()


def test_statistics_of_a_known_image():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[:, 0, :, 2:] = 100  # the right half is red
    found = Appearance.of(image)
    assert found.colour[0].tolist() == [50, 0, 0]
    assert found.chroma.item() == 50
    assert found.contrast.item() == pytest.approx(0.299 * 50)
    assert found.sharpness.item() == pytest.approx(0.299 * 100)
    assert found.deviation.item() == pytest.approx(50 / 3**0.5)


def test_repeating_keeps_the_samples_of_an_image_together(real):
    twice = Appearance.of(real[:3]).repeated(2)
    assert twice.chroma.tolist() == Appearance.of(real[:3].repeat_interleave(2, dim=0)).chroma.tolist()
