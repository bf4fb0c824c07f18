"""`clipdit train`: a preset, a data folder, a run folder, and any setting of the experiment as an option."""

import tyro

from clipdit.cli import UsageError, parse_errors_on_one_line, takes_argv


@takes_argv
def train(arguments: list[str]) -> int:
    """Train a preset on a folder of pairs; the run folder is a checkpoint at every save."""
    import logging
    from pathlib import Path
    from typing import Annotated

    from clipdit.presets import PRESETS

    summaries = [f"  {name:<18} {(function.__doc__ or '').strip().splitlines()[0]}" for name, function in PRESETS.items()]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: clipdit train PRESET --data DIR --out RUN [--minutes M] [--resume] [--json] [--SETTING VALUE ...]\n")
        print("presets:\n" + "\n".join(summaries))
        print("\n`clipdit train PRESET --help` lists every setting with its default.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in PRESETS:
        raise UsageError(f"{name} is no preset; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    kind = type(preset)

    def command(
        *,
        data: Path,
        out: Path,
        minutes: float | None = None,
        resume: bool = False,
        json: bool = False,
        experiment: Annotated[kind, tyro.conf.arg(name="")] = preset,  # type: ignore[valid-type]  (known at run time only)
    ) -> tuple[Path, Path, float | None, bool, bool, object]:
        """Train this preset.

        Args:
            data: folder or manifest of pairs; docs/data.md lists the layouts.
            out: the run folder.
            minutes: stop after this much training time, over all resumptions; the learning rate falls with it.
            resume: go on with the run in `out`, exactly where its last save left it.
            json: print the result as JSON on stdout.
            experiment: every setting of the preset.
        """
        return data, out, minutes, resume, json, experiment

    with parse_errors_on_one_line(f"clipdit train {name}"):
        data, out, minutes, resume, as_json, experiment = tyro.cli(
            command, prog=f"clipdit train {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,)
        )
    from clipdit.train.processes import processes
    from clipdit.train.runs import run

    main = processes().is_main_process
    if not main:
        logging.getLogger("clipdit").setLevel(logging.ERROR)  # the first process speaks for all
    try:
        progress = run(experiment, name, data, out, resume=resume, minutes=minutes)  # type: ignore[arg-type]  (some Experiment)
    finally:
        processes().destroy_process_group()
    if not main:
        return 0
    if as_json:
        import json

        print(json.dumps({"out": str(out), "steps": progress.step, "seconds": round(progress.seconds, 1)}))
    else:
        logging.getLogger(__name__).info("done: %d steps in %.1f min; %s", progress.step, progress.seconds / 60, out)
    return 0
