"""The checkpoint folder: what is saved comes back, and what is damaged is refused in one line."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clipdit.decoding import read_image
from clipdit.diffusion import DDPM
from clipdit.flow import FlowMatching
from clipdit.images import write_image
from clipdit.model.dit import DiT
from clipdit.model.taef2 import Taef2
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint, save_checkpoint
from clipdit.testing import tiny_checkpoint, tiny_pipeline

DIT = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP = "image_encoder/model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Read only."""
    return tiny_checkpoint(tmp_path_factory.mktemp("pipeline") / "checkpoint")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """One to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def sources():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def edit(path, **changes):
    """Changes a JSON object; a value of Ellipsis deletes its key."""
    plain = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- what is saved comes back ---


@pytest.mark.parametrize("conditioning", ["clip", "concat", "both"])
@pytest.mark.parametrize(
    "objective", [FlowMatching(), FlowMatching(solver="heun", shift=2.0), DDPM(timesteps=50), DDPM(solver="ddpm")]
)
def test_saved_and_loaded_it_makes_the_same_images(conditioning, objective, tmp_path, sources):
    pipeline = tiny_pipeline(conditioning=conditioning, objective=objective)
    save_checkpoint(pipeline, tmp_path / "run")
    loaded = load_checkpoint(tmp_path / "run")
    assert type(loaded.objective) is type(objective) and loaded.objective.solver == objective.solver
    assert (loaded.native_size, loaded.sampling_defaults) == (pipeline.native_size, pipeline.sampling_defaults)
    images = loaded(sources, seeds=[5, 6])
    assert images.shape == sources.shape and images.dtype == torch.uint8 and images.float().std() > 1
    assert torch.equal(images, pipeline(sources, seeds=[5, 6]))
    assert not torch.equal(images, loaded(sources, seeds=[5, 7]))
    assert (tmp_path / "run" / "image_encoder").exists() == (conditioning != "concat")


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "Taef2"])
def test_every_kind_of_vae_can_be_in_a_checkpoint(kind, tmp_path, sources):
    pipeline = tiny_pipeline(conditioning="concat")
    channels = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    torch.manual_seed(0)
    vae = (
        Taef2(latent_channels=4, encoder_block_out_channels=(64,) * 4)
        if kind == "Taef2"
        else AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    )
    settings = {name: pipeline.config[name] for name in ("latents_mean", "latents_std", "image_size", "default_steps")}
    save_checkpoint(ClipDiTPipeline(pipeline.transformer, vae.eval(), pipeline.scheduler, **settings), tmp_path / "run")
    loaded = load_checkpoint(tmp_path / "run")
    assert type(loaded.vae) is type(vae)
    assert torch.equal(ClipDiTPipeline.from_pretrained(tmp_path / "run")(sources), loaded(sources))


def test_the_folder_is_whole_and_only_safetensors(checkpoint):
    files = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    assert files == sorted(
        [DIT, VAE, CLIP, "model_index.json", "scheduler/scheduler_config.json"]
        + [f"{part}/config.json" for part in ("transformer", "vae", "image_encoder")]
    )
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "ClipDiTPipeline" and index["transformer"] == ["clipdit.model.dit", "DiT"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["image_encoder"][0] == "transformers"


def test_saved_again_it_is_the_same_to_the_last_byte(checkpoint, tmp_path):
    save_checkpoint(load_checkpoint(checkpoint), tmp_path / "again")
    for path in (p for p in checkpoint.rglob("*") if p.is_file()):
        again = tmp_path / "again" / path.relative_to(checkpoint)
        if path.suffix == ".json":  # without the place it was loaded from, for one
            assert json.loads(again.read_text()) == json.loads(path.read_text()), path.name
        else:
            assert again.read_bytes() == path.read_bytes(), path.name


def test_diffusers_own_call_opens_the_folder(checkpoint, sources):
    wanted = load_checkpoint(checkpoint)(sources, seeds=[1, 2])
    for name in (checkpoint, str(checkpoint)):
        assert torch.equal(ClipDiTPipeline.from_pretrained(name)(sources, seeds=[1, 2]), wanted)
    assert torch.equal(
        ClipDiTPipeline.from_pretrained(checkpoint, disable_mmap=True)(sources, seeds=[1, 2]), wanted
    )  # read by diffusers


def test_each_part_opens_with_its_own_library(checkpoint):
    pipeline = load_checkpoint(checkpoint)
    parts = {
        "transformer": DiT.from_pretrained(checkpoint, subfolder="transformer"),
        "vae": AutoencoderKL.from_pretrained(checkpoint, subfolder="vae"),
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(checkpoint / "image_encoder"),
    }
    for name, part in parts.items():
        wanted = getattr(pipeline, name).state_dict()
        assert wanted.keys() == part.state_dict().keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in part.state_dict().items())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    assert dict(scheduler.config) == dict(pipeline.scheduler.config)


def test_components_and_settings_can_be_replaced_on_loading(folder):
    (folder / DIT).unlink()  # not needed, then
    other = DiT(width=32, depth=1, heads=2, clip_token_width=24, clip_embedding_width=16)
    pipeline = ClipDiTPipeline.from_pretrained(folder, transformer=other, default_steps=7)
    assert pipeline.transformer is other and pipeline.sampling_defaults.steps == 7


def test_a_hub_id_is_downloaded_as_safetensors_and_read_like_a_folder(checkpoint, monkeypatch, sources):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        if name != "someone/shoes":
            raise OSError("401 Client Error.\n\nRepository Not Found")
        return checkpoint

    monkeypatch.setattr(ClipDiTPipeline, "download", download)
    pipeline = ClipDiTPipeline.from_pretrained("someone/shoes", revision="v1", torch_dtype=torch.bfloat16)
    assert asked == {"name": "someone/shoes", "use_safetensors": True, "revision": "v1"}
    assert pipeline.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^no checkpoint at someone/else: .*\(401 Client Error\. Repository Not Found\)$"):
        ClipDiTPipeline.from_pretrained("someone/else")
    with pytest.raises(ValueError, match="safetensors only"):
        ClipDiTPipeline.from_pretrained("someone/shoes", use_safetensors=False)


def test_weights_stored_in_half_precision_load_as_float32(folder, sources):
    wanted = load_checkpoint(folder)(sources)
    for file in (DIT, VAE, CLIP):
        edit_tensors(folder / file, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    for pipeline in (load_checkpoint(folder), ClipDiTPipeline.from_pretrained(folder)):
        assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.image_encoder.dtype == torch.float32
        assert (pipeline(sources).int() - wanted.int()).abs().max() <= 2
    half = load_checkpoint(folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == half.image_encoder.dtype == torch.bfloat16
    assert half.autoencoder.std.dtype == torch.float32


def test_weights_in_shards_load(checkpoint, tmp_path, sources):
    pipeline = load_checkpoint(checkpoint)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for part in ("transformer", "vae", "image_encoder"):
        assert len(list((tmp_path / "shards" / part).glob("*.safetensors"))) > 1, part
    assert torch.equal(load_checkpoint(tmp_path / "shards")(sources), pipeline(sources))


def test_files_beside_the_parts_do_not_matter(folder):
    (folder / "experiment.json").write_text("not read here")
    (folder / "README.md").write_text("a card")
    (folder / "transformer" / ".diffusion_pytorch_model.safetensors.abc.part").write_text("what a killed run left")
    (folder / "transformer" / "optimizer.bin").write_bytes(b"not read")
    load_checkpoint(folder)


def test_a_replaced_part_is_the_one_that_is_used(checkpoint):
    pipeline = load_checkpoint(checkpoint)
    assert isinstance(pipeline.objective, FlowMatching)
    pipeline.scheduler = DDPM().to_scheduler()
    assert isinstance(pipeline.objective, DDPM)
    vae = tiny_pipeline(seed=1).vae
    pipeline.vae = vae
    assert pipeline.autoencoder.vae is vae


def test_loading_and_saving_say_nothing(checkpoint, tmp_path):
    script = f"""
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint, save_checkpoint
import torch
pipeline = load_checkpoint({str(checkpoint)!r})
load_checkpoint({str(checkpoint)!r}, dtype=torch.bfloat16)
from pathlib import Path
save_checkpoint(pipeline, Path({str(tmp_path)!r}))
ClipDiTPipeline.from_pretrained({str(tmp_path)!r}, torch_dtype=torch.float16)
pipeline(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
"""
    done = subprocess.run([sys.executable, "-W", "always::FutureWarning", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_documentation_runs(checkpoint, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "checkpoint.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "runs/shoes")
    write_image("drawing.png", torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8))
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})
    assert len(blocks) == 2 and read_image(Path("shoe.png")).shape == (3, 50, 70)


# --- what is damaged is refused ---


class Evil:
    """Runs when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def write(path, content):
    path.write_bytes(content)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def swap_for_pickle(folder, part, stem, name):
    (folder / part / f"{stem}.safetensors").unlink()
    write(folder / part / name, pickle.dumps(Evil(folder / "executed")))


def put_nan(name):
    def change(tensors):
        tensors[name].view(-1)[0] = float("nan")

    return change


def other_vae(folder):
    shutil.rmtree(folder / "vae")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=8, layers_per_block=1).save_pretrained(
        folder / "vae"
    )


def other_clip(folder):
    shutil.rmtree(folder / "image_encoder")
    config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**config, patch_size=8, projection_dim=20)).save_pretrained(
        folder / "image_encoder"
    )


def other_scheduler(folder, scheduler, **changes):
    edit(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "scheduler" / "scheduler_config.json", **changes)


def index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


def config(part, **changes):
    return lambda folder: edit(folder / part / "config.json", **changes)


DAMAGES = {
    # the folder
    "no folder": (lambda f: shutil.rmtree(f), "there is no folder"),
    "a file instead of a folder": (lambda f: (shutil.rmtree(f), write(f, b"x")), "there is no folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json, so it is no checkpoint"),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "transformer is not whole: config.json is missing"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae is not whole: config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler is not whole: scheduler_config.json is missing"),
    "no image_encoder": (lambda f: shutil.rmtree(f / "image_encoder"), "image_encoder is not whole: config.json is missing"),
    "no configuration": (lambda f: (f / "vae" / "config.json").unlink(), "vae is not whole: config.json is missing"),
    "no weights": (lambda f: (f / DIT).unlink(), "is not whole: diffusion_pytorch_model.safetensors is missing"),
    "no CLIP weights": (lambda f: (f / CLIP).unlink(), "image_encoder is not whole: model.safetensors is missing"),
    # the index
    "index is no JSON": (lambda f: write(f / "model_index.json", b"{'a': 1"), "model_index.json is damaged"),
    "index is no text": (lambda f: write(f / "model_index.json", b"\xff\xfe\x00"), "model_index.json is damaged"),
    "index is a list": (lambda f: write(f / "model_index.json", b"[]"), "is damaged: it holds a list"),
    "index is a folder": (
        lambda f: ((f / "model_index.json").unlink(), (f / "model_index.json").mkdir()),
        "model_index.json is damaged",
    ),
    "another pipeline": (index(_class_name="StableDiffusionPipeline"), "is a StableDiffusionPipeline; wanted a ClipDiTPipeline"),
    "no class": (index(_class_name=...), "is a pipeline without a class; wanted a ClipDiTPipeline"),
    "index without a part": (index(vae=...), "model_index.json is damaged: vae is None; wanted its library and class"),
    "index with a number for a part": (index(image_encoder=3), "image_encoder is 3; wanted its library and class"),
    "wrong class for a part": (
        index(vae=["transformers", "CLIPModel"]),
        "names transformers.CLIPModel as vae; wanted AutoencoderKL",
    ),
    "code to import": (
        index(transformer=["os", "system"]),
        "names os.system as transformer; wanted DiT or GlobalGenerator or UNet",
    ),
    "class other than the configuration's": (
        index(vae=["diffusers", "AutoencoderTiny"]),
        "AutoencoderKL; wanted AutoencoderTiny",
    ),
    "image_encoder not named": (index(image_encoder=[None, None]), "conditioning is both, which needs an image_encoder"),
    "means of another number of channels": (index(latents_mean=[0.0]), "latents have 4 channels, but 1 means and 4 deviations"),
    "deviation of zero": (index(latents_std=[1.0, 1.0, 0.0, 1.0]), "deviations finite and above 0"),
    "mean that is no number": (index(latents_mean=[0.0, 0.0, "0", 0.0]), "wanted a finite number for each latent channel"),
    "deviation that is not finite": (index(latents_std=[1.0, 1.0, float("nan"), 1.0]), "wanted a finite number for each"),
    "image size of one number": (index(image_size=[32]), "image_size is [32]; wanted [height, width] in pixels"),
    "image size that does not divide": (index(image_size=[32, 36]), "image_size is [32, 36]; wanted multiples of 8"),
    "no steps": (index(default_steps=0), "default_steps is 0; wanted a whole number above 0"),
    "guidance that is no number": (index(default_guidance=None), "default_guidance is None; wanted a number"),
    "guidable that is neither": (index(guidable=1), "guidable is 1; wanted true or false"),
    # weights
    "truncated weights": (lambda f: truncate(f / DIT, 20_000), "is damaged or no safetensors file"),
    "truncated header": (lambda f: truncate(f / VAE, 100), "is damaged or no safetensors file"),
    "last byte missing": (lambda f: truncate(f / CLIP, -1), "is damaged or no safetensors file"),
    "empty weights": (lambda f: truncate(f / DIT, 0), "is damaged or no safetensors file"),
    "garbage": (lambda f: write(f / VAE, b"\x80garbage" * 4000), "is damaged or no safetensors file"),
    "a folder instead of weights": (lambda f: ((f / DIT).unlink(), (f / DIT).mkdir()), "is damaged or no safetensors file"),
    "pickle named safetensors": (
        lambda f: swap_for_pickle(f, "transformer", "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors"),
        "is damaged or no safetensors file",
    ),
    "pickle instead of safetensors": (
        lambda f: swap_for_pickle(f, "transformer", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        "diffusion_pytorch_model.bin is a pickle, which can run code and is never loaded",
    ),
    "pickled CLIP": (
        lambda f: swap_for_pickle(f, "image_encoder", "model", "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which can run code and is never loaded",
    ),
    "weights in two ways": (
        lambda f: write(f / (DIT + ".index.json"), b"{}"),
        "holds both diffusion_pytorch_model.safetensors and diffusion_pytorch_model.safetensors.index.json",
    ),
    "a tensor missing": (lambda f: edit_tensors(f / DIT, lambda t: t.pop("latent_in.bias")), "its weights lack latent_in.bias"),
    "a CLIP tensor missing": (
        lambda f: edit_tensors(f / CLIP, lambda t: t.pop("visual_projection.weight")),
        "its weights lack visual_projection.weight",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f / VAE, lambda t: t.update(more=torch.ones(1))),
        "configuration asks for, more",
    ),
    "NaN in the transformer": (
        lambda f: edit_tensors(f / DIT, put_nan("latent_in.weight")),
        "latent_in.weight holds numbers that are not",
    ),
    "NaN in the vae": (lambda f: edit_tensors(f / VAE, put_nan("encoder.conv_in.bias")), "encoder.conv_in.bias holds numbers"),
    "NaN in CLIP": (
        lambda f: edit_tensors(f / CLIP, put_nan("visual_projection.weight")),
        "visual_projection.weight holds numbers",
    ),
    # configurations
    "configuration that is no JSON": (lambda f: write(f / "transformer" / "config.json", b"width: 32"), "config.json is damaged"),
    "empty configuration": (lambda f: write(f / "image_encoder" / "config.json", b""), "config.json is damaged"),
    "another width": (config("transformer", width=48), "blocks.0.cross.kv.bias is 64 in its weights, 96 by its configuration"),
    "more blocks": (config("transformer", depth=3), "its weights lack blocks.2."),
    "fewer blocks": (config("transformer", depth=1), "its weights hold, beside what its configuration asks for, blocks.1."),
    "another patch": (config("transformer", patch=1), "by its configuration"),
    "no heads": (
        config("transformer", heads=0),
        "config.json is damaged: latent_channels, patch, width, depth and heads must be",
    ),
    "width in words": (config("transformer", width="wide"), "config.json is damaged"),
    "unknown positions": (config("transformer", positions="learned"), "config.json is damaged"),
    "vae of another width": (config("vae", block_out_channels=[4, 4, 8]), "by its configuration"),
    "vae blocks of unknown type": (config("vae", down_block_types=["Nothing"] * 3), "config.json is damaged"),
    "CLIP of another width": (config("image_encoder", hidden_size=32), "by its configuration"),
    "CLIP that is none": (config("image_encoder", model_type="bert"), "is of type bert; wanted a CLIP"),
    # parts that do not belong together
    "vae of other channels": (other_vae, "the DiT takes 4 latent channels, the VAE makes 8"),
    "CLIP of other widths": (other_clip, "takes CLIP tokens and embeddings of widths (24, 16), the image_encoder makes (32, 20)"),
    # the scheduler
    "scheduler that diffusers does not have": (
        lambda f: (
            index(scheduler=["diffusers", "Magic"])(f),
            edit(f / "scheduler" / "scheduler_config.json", _class_name="Magic"),
        ),
        "names Magic as scheduler, which diffusers does not have",
    ),
    "scheduler that is none": (
        index(scheduler=["diffusers", "AutoencoderKL"]),
        "AutoencoderKL as scheduler, which diffusers does not",
    ),
    "scheduler of two minds": (index(scheduler=["diffusers", "DDIMScheduler"]), "but model_index.json names DDIMScheduler"),
    "scheduler we do not follow": (
        lambda f: other_scheduler(f, EulerAncestralDiscreteScheduler()),
        "EulerAncestralDiscreteScheduler",
    ),
    "scheduler setting we do not follow": (
        lambda f: other_scheduler(f, FlowMatchEulerDiscreteScheduler(), use_karras_sigmas=True),
        "use_karras_sigmas = True; clipdit samples with False. Correct scheduler_config.json",
    ),
    "clipping DDIM": (lambda f: other_scheduler(f, DDIMScheduler(timestep_spacing="trailing")), "clip_sample = True"),
    "scheduler setting of another type": (lambda f: other_scheduler(f, DDIMScheduler(), num_train_timesteps="many"), "scheduler"),
    "more steps than the scheduler has": (
        lambda f: (other_scheduler(f, DDPM(timesteps=10).to_scheduler()), index(default_steps=20)(f)),
        "does not fit together",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage, folder, recwarn):
    break_it, message = DAMAGES[damage]
    break_it(folder)
    texts = []
    for load in (load_checkpoint, lambda f: ClipDiTPipeline.from_pretrained(f, local_files_only=True)):
        if not folder.is_dir() and load is not load_checkpoint:
            continue  # a hub id, for all that diffusers knows
        with pytest.raises(ValueError) as error:
            load(folder)
        assert type(error.value) is ValueError
        texts.append(str(error.value))
    text = texts[0]
    assert set(texts) == {text}
    assert message in text and str(folder) in text, text
    assert "\n" not in text and len(text) < 500
    assert not (folder / "executed").exists()  # by a pickle
    assert not [str(w.message) for w in recwarn if "unpickl" in str(w.message)]


def test_the_evil_pickle_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_part_that_is_not_read_by_name_is_never_imported(folder):
    index(vae=["antigravity", "AutoencoderKL"])(folder)
    with pytest.raises(ValueError, match=r"names antigravity\.AutoencoderKL as vae"):
        load_checkpoint(folder)
    assert "antigravity" not in sys.modules
