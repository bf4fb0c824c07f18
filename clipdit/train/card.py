"""The model card of a run folder (README.md): what was trained, on what, how, with what result. Hugging Face's format."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import ModelCardData

from clipdit.data.pairs import PairSet
from clipdit.provenance import hardware, versions
from clipdit.train.guard import flat
from clipdit.train.state import Progress

CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a run makes, in the words of a card."""

    library: str
    task: str | None
    tags: tuple[str, ...]
    use: str
    """How to use the folder `{folder}`, Markdown."""


TRANSLATOR = Kind(
    library="diffusers",
    task="image-to-image",
    tags=("image-to-image", "diffusion-transformer"),
    use="""```sh
clipdit translate INPUT OUTPUT --model {folder}
clipdit evaluate --data PAIRS --model {folder} --out evaluation.json
```

```python
from clipdit.pipeline import ClipDiTPipeline

pipeline = ClipDiTPipeline.from_pretrained("{folder}")
```""",
)
GENERATOR = replace(TRANSLATOR, tags=("image-to-image", "gan"))
AUTOENCODER = Kind(
    library="diffusers",
    task=None,
    tags=("autoencoder",),
    use="""`vae/` is a VAE as diffusers saves it. To train a translator on its latents:

```sh
clipdit train PRESET --vae {folder} --data PAIRS --out RUN
```""",
)
DECODER = Kind(
    library="diffusers",
    task=None,
    tags=("autoencoder",),
    use="""`vae/` is the VAE that was given, its decoder fine-tuned on the targets of these pairs. Its latents are what they
were, so it can take the place of `vae/` in any checkpoint that was trained with the old one:

```sh
cp {folder}/vae/* CHECKPOINT/vae/
clipdit train PRESET --vae {folder} --data PAIRS --out RUN
```""",
)
CLIP = Kind(
    library="transformers",
    task=None,
    tags=("clip",),
    use="""`clip/` is a transformers CLIPModel with its tokenizer. To train a translator that sees through its image encoder:

```sh
clipdit train PRESET --clip {folder} --data PAIRS --out RUN
```""",
)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a card tells of a run, as far as it does not change while it trains."""

    kind: Kind
    summary: str
    """Of the preset, one sentence."""
    experiment: dict
    """The resolved experiment, clipdit.experiment.to_json."""
    preset: dict
    """The same of the preset as it is."""
    data: Path
    found: PairSet
    out: Path
    minutes: float | None


def changes(experiment: dict, preset: dict) -> dict[str, tuple[object, object]]:
    """The settings in which an experiment differs from its preset: name -> (here, in the preset)."""
    here, there = flat(experiment), flat(preset)
    names = [name for name in here | there if not name.startswith("data.")]
    return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}


def command(told: Told) -> str:
    """The command that trains so. Folders by their names: where they were is nobody's business."""
    words = ["clipdit", "train", str(told.experiment["preset"]), "--data", told.data.name, "--out", told.out.name]
    if told.minutes is not None:
        words += ["--minutes", f"{told.minutes:g}"]
    for name, (value, _) in changes(told.experiment, told.preset).items():
        group, _, last = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):  # what is on by itself has an option that switches it off
            words.append(f"--{group}.{last}" if value else f"--{group}.no-{last}")
        else:
            words += [f"--{group}.{last}" if group else f"--{last}"]
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def model_card(told: Told, progress: Progress, last_row: dict[str, float] | None) -> str:
    """The card. `last_row` is the newest one of the history, None when there is none yet."""
    settings, found, train = told.experiment, told.found, told.experiment["train"]
    header = ModelCardData(library_name=told.kind.library, pipeline_tag=told.kind.task, tags=["clipdit", *told.kind.tags])
    splits = {name: len(found.split(name)) for name in ("train", "val", "test")}
    size, direction = settings["pairs"]["size"], settings["pairs"]["direction"]
    differing = [
        [f"`{name}`", f"`{_plain(here)}`", f"`{_plain(there)}`"] for name, (here, there) in changes(settings, told.preset).items()
    ]
    losses = [[n.removeprefix("loss/"), f"{v:.4g}"] for n, v in (last_row or {}).items() if n.startswith("loss/")]
    machine = hardware()
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {told.out.resolve().name}",
        f"Made with the preset `{settings['preset']}` of clipdit ({told.summary.rstrip('.')}), step {progress.step:,} of "
        f"{train['steps']:,}.",
        "## Use",
        told.kind.use.format(folder=told.out.name),
        "## Data",
        _table(["", ""], [
            ["folder", f"`{told.data.name}`"],
            ["layout", f"{found.layout}, {direction}"],
            ["pairs", ", ".join(f"{count:,} {name}" for name, count in splits.items() if count)],
            ["left out", f"{len(found.problems):,} that could not be used"],
            ["size", f"{size} x {size} px"],
        ]),
        "## Training",
        f"```sh\n{command(told)}\n```",
        "Settings that differ from the preset:" if differing else "All settings are the preset's.",
        *([_table(["setting", "here", "preset"], differing)] if differing else []),
        f"{progress.step * train['batch_size']:,} images in {progress.seconds / 60:.1f} minutes. All settings are in "
        "`experiment.json`, all losses in `history.jsonl`, samples from held-out pairs in `samples/`.",
        *(["Losses at the end (means of the last interval):", _table(["loss", "value"], losses)] if losses else []),
        "These are losses in training, not measures of quality: those come from `clipdit evaluate`."
        if told.kind in (TRANSLATOR, GENERATOR)
        else "These are losses in training, not measures of quality.",
        "## Versions and machine",
        _table(["", ""], [
            *([name, version] for name, version in versions().items()),
            ["processor", f"{machine['cpu']}, {machine['cores']} cores"],
            *(["GPU", str(name)] for name in _strings(machine["gpus"])),
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
