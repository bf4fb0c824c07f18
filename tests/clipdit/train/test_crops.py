"""Crops for autoencoders."""

import torch

from clipdit.train.crops import draw_crops
from clipdit.train.order import step_generator


def images(count: int = 6, height: int = 12, width: int = 20) -> torch.Tensor:
    """Noise: every crop is found in one place only."""
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(step: int = 0, **changes) -> torch.Tensor:
    return draw_crops(images(), 6, step, 0, **{"side": 8, "recolour": 0.0, "generator": step_generator(0, step)} | changes)


def test_every_crop_is_a_window_of_another_image_or_its_mirror_image():
    crops, owners, mirrored = draw(), [], 0
    for crop in crops:
        for i, image in enumerate(images()):
            windows = image.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 5, 13, 8, 8)
            for way, flipped in ((crop, 0), (crop.flip(-1), 1)):
                if (windows == way[:, None, None]).all((0, 3, 4)).any():
                    owners.append(i)
                    mirrored += flipped
    assert sorted(owners) == list(range(6))
    assert 0 < mirrored < 6


def test_crops_are_a_function_of_the_step():
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_a_side_of_0_or_a_larger_one_takes_what_is_there():
    assert draw(side=0).shape == (6, 3, 12, 20)
    assert draw(side=16).shape == (6, 3, 12, 16)


def test_recoloured_crops_hold_the_same_numbers_in_other_channels_and_places():
    plain, some = draw(), draw(recolour=1.0)
    assert not torch.equal(plain, some)
    known = {tuple(sorted(colour)) for image in images() for colour in image.flatten(1).T.tolist()}
    assert all(tuple(sorted(colour)) in known for crop in some for colour in crop.flatten(1).T.tolist())
