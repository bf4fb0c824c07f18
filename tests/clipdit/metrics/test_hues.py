import torch

from clipdit.metrics.hues import FEWEST, HUES, hues

COLOURS = {
    "red": (230, 30, 40),
    "orange": (255, 160, 40),
    "yellow": (250, 220, 60),
    "green": (0, 200, 90),
    "cyan": (0, 180, 200),
    "blue": (20, 90, 230),
    "violet": (130, 70, 200),
    "pink": (240, 60, 160),
}


def image_of(*colours: tuple[int, int, int]) -> torch.Tensor:
    """uint8 (1, 3, 24, 24 for each colour): squares side by side."""
    return torch.cat([torch.tensor(c, dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 24, 24) for c in colours], dim=3)


def test_each_hue_has_the_name_that_people_give_it_and_comes_back_from_an_exact_copy():
    assert set(COLOURS) == set(HUES)
    image = image_of(*COLOURS.values())
    found = hues(image, image)
    assert list(found) == list(HUES)
    assert all(seen.came_back == name and seen.distance == 0 and not seen.turned for name, seen in found.items())
    assert all(seen.pixels == 24 * 24 for seen in found.values())


def test_a_colour_that_comes_back_as_another_or_as_grey_is_named():
    image = image_of(COLOURS["green"], COLOURS["violet"], COLOURS["red"])
    copy = image_of((40, 90, 200), (110, 110, 120), (220, 40, 45))
    found = hues(image, copy)
    assert [(name, seen.came_back, seen.turned) for name, seen in found.items()] == [
        ("red", "red", False),
        ("green", "blue", True),
        ("violet", "grey", True),
    ]


def test_of_grey_and_of_a_few_pixels_nothing_is_said():
    image = image_of((255, 255, 255), (90, 90, 90), (200, 190, 195))
    few = FEWEST - 1
    image.flatten(2)[..., :few] = torch.tensor(COLOURS["green"], dtype=torch.uint8)[:, None]
    assert hues(image, torch.zeros_like(image)) == {}
