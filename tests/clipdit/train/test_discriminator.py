"""The adversary: whose gradient goes where, and scores of patches."""

import pytest
import torch

from clipdit.train.discriminator import Discriminator, adversarial_losses


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return Discriminator(channels=8)


def images(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_losses_are_the_hinge_by_image(discriminator: Discriminator):
    output, image = images(0), images(1)
    losses = adversarial_losses(discriminator, output, image)
    with torch.no_grad():
        fake, real = discriminator(output), discriminator(image)
    assert fake.shape == (3, 1, 4, 4)
    torch.testing.assert_close(losses["adversary"], -fake.mean((1, 2, 3)))
    hinge = (1 - real).clamp(min=0) + (1 + fake).clamp(min=0)
    torch.testing.assert_close(losses["discriminator"], hinge.mean((1, 2, 3)))


def test_each_loss_teaches_its_own_side_alone(discriminator: Discriminator):
    output = images(0).requires_grad_()
    losses = adversarial_losses(discriminator, output, images(1))
    losses["discriminator"].sum().backward(retain_graph=True)
    assert output.grad is None and all(parameter.grad.abs().max() > 0 for parameter in discriminator.parameters())
    for parameter in discriminator.parameters():
        parameter.grad = None
    losses["adversary"].sum().backward()
    assert output.grad.abs().max() > 0 and all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_scores_of_an_image_do_not_depend_on_its_batch(discriminator: Discriminator):
    both = images(0)
    alone = discriminator(both[:1])
    torch.testing.assert_close(discriminator(both)[:1], alone, rtol=1e-4, atol=1e-5)


def test_it_learns_to_tell_smooth_from_rough(discriminator: Discriminator):
    optimizer = torch.optim.AdamW(discriminator.parameters(), 2e-3)
    for step in range(60):
        image = images(step)
        smooth = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1)
        loss = adversarial_losses(discriminator, smooth, image)["discriminator"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
