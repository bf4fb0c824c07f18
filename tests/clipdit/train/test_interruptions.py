"""Real processes that are killed, interrupted, run out of disk or lose a partner: what stood stays whole, and the run goes on as
if nothing had happened. And two processes are one."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipdit.pipeline import load_checkpoint
from clipdit.train.state import STATE_FILE, read_progress

TRANSFORMER = Path("transformer/diffusion_pytorch_model.safetensors")

KILL_AT_REPLACEMENT = """
import os, signal
real, count = os.replace, 0
def replace(a, b):
    global count
    count += 1
    if count == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
"""
"""Files are written beside their place and then moved into it: the kill comes between the two, at the so-many-th file."""

SLOW_STEPS = """
import time
from clipdit.train.translation import TranslationTask
draw = TranslationTask.draw
def slow(self, step):
    time.sleep(0.03)
    return draw(self, step)
TranslationTask.draw = slow
"""


def litter(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.fixture
def check_resumed(whole_run, tiny_words, start_training, history, same_bits) -> Callable[..., None]:
    """Resumes a run and checks that it becomes the uninterrupted one."""

    def check(folder: Path) -> None:
        words = tiny_words(folder, *(["--resume"] if (folder / STATE_FILE).exists() else []))
        resumed = start_training(words)
        assert resumed.wait() == 0, resumed.output
        assert history(folder) == history(whole_run)
        for file in (TRANSFORMER, Path(STATE_FILE)):
            assert same_bits(whole_run / file, folder / file)
        assert litter(folder) == []
        load_checkpoint(folder)

    return check


def test_a_run_killed_at_a_random_step_and_resumed_is_the_uninterrupted_run(
    tiny_words, start_training, history, check_resumed, tmp_path
):
    kill_at = random.randint(1, 8)
    killed = start_training(tiny_words(tmp_path / "run"), before=SLOW_STEPS)
    killed.wait_for(lambda: (tmp_path / "run" / "history.jsonl").exists() and len(history(tmp_path / "run")) >= kill_at)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    print(f"killed at step {kill_at}")  # shown if what follows fails
    check_resumed(tmp_path / "run")


@pytest.mark.parametrize("number", [3, 12, 17, None])
def test_a_kill_between_two_files_leaves_a_folder_that_is_whole_and_goes_on(
    number, tiny_words, start_training, check_resumed, tmp_path
):
    """3 is within the laying out of the checkpoint, 12 and 17 around the first saves; None is any of the 25."""
    number = number or random.randint(1, 25)
    print(f"killed at file {number}")  # shown if what follows fails
    killed = start_training(tiny_words(tmp_path / "run"), before=KILL_AT_REPLACEMENT.format(number=number))
    assert killed.wait() == -signal.SIGKILL, killed.output
    if (tmp_path / "run" / "model_index.json").exists():
        load_checkpoint(tmp_path / "run")
    check_resumed(tmp_path / "run")


def test_control_c_saves_and_the_run_goes_on_from_there(tiny_words, start_training, history, check_resumed, tmp_path):
    run = start_training(tiny_words(tmp_path / "run"), before=SLOW_STEPS)
    run.wait_for(lambda: (tmp_path / "run" / "history.jsonl").exists() and len(history(tmp_path / "run")) >= 5)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    step = read_progress(tmp_path / "run").step
    assert 5 <= step < 10
    assert run.output.splitlines()[-2:] == [f"saved at step {step}; --resume goes on from there", "clipdit: interrupted"]
    load_checkpoint(tmp_path / "run")
    check_resumed(tmp_path / "run")


def test_a_full_disk_stops_the_run_in_one_line_and_leaves_the_last_save(
    whole_run, tiny_words, start_training, check_resumed, tmp_path
):
    # the first state has no moments of the optimiser yet, and is half as large
    limit = (whole_run / STATE_FILE).stat().st_size * 3 // 4
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    run = start_training(tiny_words(tmp_path / "run"), before=full)
    assert run.wait() == 2
    line = run.output.splitlines()[-1]
    assert line.startswith(f"clipdit: {tmp_path / 'run' / STATE_FILE} was not written: ")
    assert "File too large" in line
    assert line.endswith("What was saved before is intact; free some space and resume")
    assert "Traceback" not in run.output
    assert read_progress(tmp_path / "run").step == 0
    assert litter(tmp_path / "run") == []
    load_checkpoint(tmp_path / "run")
    check_resumed(tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run_in_one_line(tiny_words, start_training, tmp_path):
    spoil = """
from clipdit.train.translation import TranslationTask
draw = TranslationTask.draw
def spoilt(self, step):
    batch = draw(self, step)
    return batch | {"noise": batch["noise"] * float("nan")} if step == 6 else batch
TranslationTask.draw = spoilt
"""
    run = start_training(tiny_words(tmp_path / "run"), before=spoil)
    assert run.wait() == 2
    line = run.output.splitlines()[-1]
    assert line.startswith(
        "clipdit: loss/reconstruction became nan by step 7; the checkpoint of step 4 is intact. Lower train.lr"
    )
    assert "Traceback" not in run.output
    assert read_progress(tmp_path / "run").step == 4
    load_checkpoint(tmp_path / "run")


def test_two_processes_are_one(whole_run, tiny_words, start_ranks, history, tmp_path):
    ranks = start_ranks(2, tiny_words(tmp_path / "run"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert len(history(tmp_path / "run")) == 10
    for one, two in zip(history(whole_run), history(tmp_path / "run"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)  # float32 sums in another order
    one, two = (load_file(folder / TRANSFORMER) for folder in (whole_run, tmp_path / "run"))
    for name in one:
        # AdamW makes steps of the size of the rate of gradients however small, so a rounding error of one becomes visible
        assert (one[name] - two[name]).abs().max() < 1e-4, name
    load_checkpoint(tmp_path / "run")
    # the first process speaks and writes
    assert "2 process(es)" in ranks[0].output
    assert ranks[1].output == ""
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_two_processes_and_accumulation_are_one(whole_run, tiny_words, start_ranks, history, tmp_path):
    ranks = start_ranks(2, tiny_words(tmp_path / "run", "--train.accumulate", 2, "--train.steps", 4))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    names = ("step", "loss/reconstruction", "loss/total", "gradient_norm")
    for one, two in zip(history(whole_run)[:4], history(tmp_path / "run"), strict=True):
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-5)


def test_a_signal_to_any_process_stops_all_at_the_same_step(tiny_words, start_ranks, history, tmp_path):
    ranks = start_ranks(2, tiny_words(tmp_path / "run", "--train.steps", 400), before=SLOW_STEPS)
    ranks[0].wait_for(lambda: (tmp_path / "run" / "history.jsonl").exists() and len(history(tmp_path / "run")) >= 3)
    ranks[1].send(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [130, 130]
    step = read_progress(tmp_path / "run").step
    assert step % 10 == 0 and 0 < step < 400
    assert len(history(tmp_path / "run")) == step
    load_checkpoint(tmp_path / "run")


def test_a_run_goes_on_with_another_number_of_processes(whole_run, tiny_words, start_ranks, start_training, history, tmp_path):
    ranks = start_ranks(2, tiny_words(tmp_path / "run"), before=SLOW_STEPS)
    ranks[0].wait_for(lambda: (tmp_path / "run" / "history.jsonl").exists() and len(history(tmp_path / "run")) >= 5)
    for rank in ranks:
        rank.send(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    resumed = start_training(tiny_words(tmp_path / "run", "--resume"))
    assert resumed.wait() == 0, resumed.output
    for one, other in zip(history(whole_run), history(tmp_path / "run"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_do_not_wait_for_one_that_failed(rank, tiny_words, start_ranks, tmp_path):
    failing = f"""
import os
from clipdit.train.translation import TranslationTask
draw = TranslationTask.draw
def broken(self, step):
    if step == 5 and os.environ["RANK"] == "{rank}":
        raise ValueError("this process fails on purpose")
    return draw(self, step)
TranslationTask.draw = broken
"""
    ranks = start_ranks(2, tiny_words(tmp_path / "run"), before=failing)
    codes = [each.wait() for each in ranks]
    assert codes[rank] == 2 and codes[1 - rank] != 0
    assert ranks[rank].output.splitlines()[-1].endswith("clipdit: this process fails on purpose")
    assert read_progress(tmp_path / "run").step == 4
    load_checkpoint(tmp_path / "run")


def test_what_the_first_process_refuses_all_refuse(tiny_words, start_ranks, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    ranks = start_ranks(2, tiny_words(tmp_path / "run"))
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert ranks[0].output == f"clipdit: {tmp_path / 'run'} is there already; give a new or empty folder\n"
    assert ranks[1].output == "clipdit: the first process stopped; its message says why\n"


def test_a_batch_that_does_not_divide_among_processes_is_refused(tiny_words, start_ranks, tmp_path):
    ranks = start_ranks(2, tiny_words(tmp_path / "run", "--train.batch-size", 3))
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "clipdit: train.batch_size 3 does not divide among 2 processes x 1 parts\n" in ranks[0].output


@pytest.mark.parametrize("preset", ["emoji_vae", "vae_decoder", "emoji_clip"])
def test_two_processes_train_one_vae_one_decoder_and_one_clip(preset, pairs_folder, parts, start_ranks, history, tmp_path):
    """Also where no cache makes them wait for one another at the start. CLIP contrasts an image with those of its own process
    only, so its losses are not those of one process; nor is the deviation of latents, to which noise is relative."""
    data = tmp_path / "pairs"
    (data / "train").mkdir(parents=True)
    for file in (pairs_folder / "train").iterdir():
        (data / "train" / file.name).write_bytes(file.read_bytes())
    lines = [{"id": str(i), "name": f"field {i}", "keywords": ["colour"]} for i in range(12)]
    (data / "names.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "train", preset, "--data", str(data), "--pairs.size", "32",
        "--train.steps", "3", "--train.batch-size", "8", "--train.precision", "fp32", "--train.log-every", "1",
    ]  # fmt: skip
    if preset == "emoji_vae":
        words += ["--model.channels", "8", "8", "8"]
        words += ["--model.crop", "16", "--model.perceptual", "None", "--model.latent-noise", "0"]
    elif preset == "vae_decoder":
        words += ["--vae", str(parts), "--model.crop", "16", "--model.perceptual", "None", "--model.latent-noise", "0"]
    else:
        words += ["--model.image-size", "32", "--model.width", "64", "--model.layers", "1", "--model.text-width", "64"]
        words += ["--model.text-layers", "1"]
    ranks = start_ranks(2, [*words, "--out", str(tmp_path / "two")])
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert [row["step"] for row in history(tmp_path / "two")] == [1, 2, 3]
    if preset != "emoji_clip":
        one = start_ranks(1, [*words, "--out", str(tmp_path / "one")])[0]
        assert one.wait() == 0, one.output
        for single, double in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
            assert double == pytest.approx(single, rel=1e-4)
