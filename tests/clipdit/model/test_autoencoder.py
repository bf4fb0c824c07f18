"""One wrapper over three kinds of VAE, and where a VAE can come from."""

import json

import huggingface_hub.errors
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from clipdit.model import autoencoder as module
from clipdit.model.autoencoder import Autoencoder, latent_correlation, load_vae
from clipdit.model.taef2 import Taef2
from clipdit.testing import tiny_checkpoint


def kl(**changes):
    options = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4}
    return AutoencoderKL(**options | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4} | changes)


def tiny(**changes):
    options = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    return AutoencoderTiny(**options | {"num_decoder_blocks": (1, 1), "latent_channels": 3} | changes)


def taef2():
    return Taef2(latent_channels=6, encoder_block_out_channels=(64, 64, 64, 64))


MAKE = {"AutoencoderKL": kl, "AutoencoderTiny": tiny, "Taef2": taef2}
DOWNSCALE = {"AutoencoderKL": 4, "AutoencoderTiny": 2, "Taef2": 8}
CHANNELS = {"AutoencoderKL": 4, "AutoencoderTiny": 3, "Taef2": 6}


@pytest.fixture(params=MAKE)
def vae(request):
    torch.manual_seed(0)
    return MAKE[request.param]().eval()


@pytest.fixture
def image():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels(vae, latent):
    with torch.no_grad():
        return vae.decode(latent).sample


def test_size_and_channels_of_the_latent_are_those_it_names(vae, image):
    kind = type(vae).__name__
    wrapper = Autoencoder(vae)
    assert (wrapper.downscale, wrapper.latent_channels) == (DOWNSCALE[kind], CHANNELS[kind])
    with torch.no_grad():
        latent = wrapper.encode(image)
        assert latent.shape == (2, CHANNELS[kind], 16 // DOWNSCALE[kind], 24 // DOWNSCALE[kind])
        assert wrapper.decode(latent).shape == image.shape
        assert torch.equal(wrapper.encode(image), latent)  # the mean: nothing is drawn


def test_latents_are_standardised_by_channel_and_decoding_undoes_it(vae, image):
    channels = CHANNELS[type(vae).__name__]
    mean, std = [0.5 * i - 0.7 for i in range(channels)], [0.3 + 0.2 * i for i in range(channels)]
    bare, wrapper = Autoencoder(vae), Autoencoder(vae, mean, std)
    with torch.no_grad():
        raw = bare.encode(image)
        for i in range(channels):
            torch.testing.assert_close(wrapper.encode(image)[:, i], (raw[:, i] - mean[i]) / std[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wrapper.decode(wrapper.encode(image)), bare.decode(raw), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "options"), [(kl, {"scaling_factor": 0.18}), (kl, {"scaling_factor": 0.36, "shift_factor": 0.12})]
)
def test_the_factors_of_a_kl_vae_are_applied_as_in_diffusers_pipelines(make, options, image):
    torch.manual_seed(0)
    vae = make(**options).eval()
    wrapper, shift = Autoencoder(vae), options.get("shift_factor", 0.0)
    with torch.no_grad():
        raw = vae.encode(image).latent_dist.mode()
        torch.testing.assert_close(wrapper.encode(image), (raw - shift) * options["scaling_factor"])
        torch.testing.assert_close(wrapper.decode(wrapper.encode(image)), pixels(vae, raw), rtol=1e-4, atol=1e-4)


def test_the_factor_of_a_tiny_vae_is_applied(image):
    torch.manual_seed(0)
    vae = tiny(scaling_factor=0.5).eval()
    with torch.no_grad():
        raw = vae.encode(image).latents
        torch.testing.assert_close(Autoencoder(vae).encode(image), 0.5 * raw)
        torch.testing.assert_close(Autoencoder(vae).decode(0.5 * raw), pixels(vae, raw))


def test_latents_correlate_by_what_they_mean_not_by_their_scale(image):
    torch.manual_seed(0)
    one, other = kl().eval(), kl().eval()
    images = torch.cat([image, -image, image.flip(-1)])
    scaled, turned = kl().eval(), kl().eval()
    for vae, factor in ((scaled, 3.0), (turned, -3.0)):
        vae.load_state_dict(one.state_dict())
        with torch.no_grad():
            vae.quant_conv.weight.mul_(factor)
    expected = {scaled: 1.0, turned: -1.0, one: 1.0}
    for vae, value in expected.items():
        assert latent_correlation(Autoencoder(one), Autoencoder(vae), images) == pytest.approx(value, abs=1e-4)
    with torch.no_grad():
        x, y = (Autoencoder(vae).encode(images).transpose(0, 1).flatten(1) for vae in (one, other))
    by_hand = sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(x, y, strict=True)) / len(x)
    assert latent_correlation(Autoencoder(one), Autoencoder(other), images) == pytest.approx(by_hand, abs=1e-4)
    assert abs(by_hand) < 0.8
    assert latent_correlation(Autoencoder(one), Autoencoder(tiny()), images) == 0.0


def test_a_vae_in_half_precision_takes_and_gives_its_own_dtype(image):
    torch.manual_seed(0)
    wrapper = Autoencoder(kl().eval().to(torch.bfloat16), [0.1] * 4, [0.5] * 4)
    with torch.no_grad():
        latent = wrapper.encode(image)
        assert latent.dtype == wrapper.decode(latent.float()).dtype == torch.bfloat16
    assert wrapper.std.dtype == torch.float32 and not wrapper.state_dict().keys() - {f"vae.{n}" for n in wrapper.vae.state_dict()}


@pytest.mark.parametrize("kind", MAKE)
def test_an_image_does_not_depend_on_its_batch(kind: str):
    wrapper = Autoencoder(MAKE[kind]().eval())
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = wrapper.encode(image)
        assert torch.equal(wrapper.encode(image[1:2]), latent[1:2])
        assert torch.equal(wrapper.decode(latent[1:2]), wrapper.decode(latent)[1:2])
        torch.testing.assert_close(wrapper.decode(latent), wrapper.decode(latent, at_once=True), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(latent, wrapper.encode(image, at_once=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0] * 3, [1.0] * 4, "latents have 4 channels, but 3 means and 4 deviations were given"),
        ([0.0] * 4, [1.0], "4 means and 1 deviations"),
        ([], [1.0] * 4, "0 means"),
        ([0.0] * 4, [1.0, 1.0, 1.0, 0.0], "above 0"),
        ([0.0] * 4, [1.0, 1.0, 1.0, float("nan")], "above 0"),
        ([0.0, 0.0, float("inf"), 0.0], [1.0] * 4, "finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(kl(), mean, std)


def assert_same(network, other):
    assert type(network) is type(other)
    for (name, a), (other_name, b) in zip(network.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(a, b), name


def test_a_vae_loads_from_its_folder(vae, tmp_path, capfd):
    vae.save_pretrained(tmp_path)
    assert_same(load_vae(tmp_path), vae)
    assert_same(load_vae(str(tmp_path)), vae)
    assert capfd.readouterr() == ("", "")


def test_a_vae_loads_from_a_checkpoint_folder(tmp_path):
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    assert_same(load_vae(folder), AutoencoderKL.from_pretrained(folder, subfolder="vae"))


def test_taef2_loads_from_its_two_files(tmp_path):
    torch.manual_seed(0)
    vae = Taef2()
    torch.save(vae.encoder.state_dict(), tmp_path / "taef2_encoder.pth")
    torch.save(vae.decoder.state_dict(), tmp_path / "taef2_decoder.pth")
    assert_same(load_vae(tmp_path), vae)
    (tmp_path / "taef2_decoder.pth").unlink()
    with pytest.raises(ValueError, match=r"taef2_decoder\.pth cannot be read as the weights of TAEF2"):
        load_vae(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories in a folder instead of at huggingface.co; a request for a config.json or for weights finds them there."""
    http = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()

    def download(name, file, subfolder=None):
        if name not in {"someone/vae", "someone/pipeline"}:
            raise huggingface_hub.errors.LocalEntryNotFoundError("Please check your connection and try again")
        path = tmp_path / name / (subfolder or "") / file
        if not path.exists():
            raise huggingface_hub.errors.RemoteEntryNotFoundError("404 Client Error.\n\nEntry Not Found", response=http)
        return str(path)

    def from_folder(kind):
        original = kind.from_pretrained
        return lambda name, **options: original(tmp_path / name, **options)

    monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", from_folder(AutoencoderTiny))
    return tmp_path


def test_a_vae_loads_from_a_hub_id_of_a_vae_or_of_a_pipeline(hub):
    torch.manual_seed(0)
    vae = tiny()
    vae.save_pretrained(hub / "someone" / "vae")
    vae.save_pretrained(hub / "someone" / "pipeline" / "vae")
    assert_same(load_vae("someone/vae"), vae)
    assert_same(load_vae("someone/pipeline"), vae)


def test_what_a_hub_does_not_give_is_refused_in_one_line(hub):
    (hub / "someone" / "vae").mkdir(parents=True)
    (hub / "someone" / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))  # and no weights
    for name, message in [
        ("someone/else", "it is no folder here, and the hub does not give it (Please check your connection"),
        ("someone/pipeline", "(404 Client Error. Entry Not Found)"),
        ("someone/vae", "diffusion_pytorch_model.safetensors"),
    ]:
        with pytest.raises(ValueError) as error:
            load_vae(name)
        assert str(error.value).startswith(f"no VAE at {name}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_no_repository_can_have_is_refused_without_asking_a_hub():
    with pytest.raises(ValueError, match="no VAE at runs/my/vae: it is no folder here"):
        load_vae("runs/my/vae")


def test_a_folder_without_a_vae_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json, so it is no VAE; give a diffusers VAE folder"):
        load_vae(tmp_path)
    for config, message in [
        ({"_class_name": "UNet2DModel"}, "is of class UNet2DModel; wanted a VAE of class AutoencoderKL, AutoencoderTiny, Taef2"),
        ({}, "is of class None"),
        ({"_class_name": "AutoencoderKL"}, "diffusion_pytorch_model.safetensors is missing"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_vae(tmp_path)
