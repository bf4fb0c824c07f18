"""The `clipdit` command. It knows no verb by name: verbs are the entry points of the group `clipdit.commands`.

An entry point holds a function (a verb), or a dict from name to function (nested verbs; the name "" is what runs when no other
name is given). One with a dot in its name adds to another's: `bench.kernels` is what `clipdit bench kernels` runs. tyro turns a
function's annotations and docstring into options and help. What the user did wrong becomes one line on standard error and exit
code 2; `clipdit --traceback VERB ...` shows where it came from.

Only the verb that is asked for is loaded, and verbs import torch inside their functions, so `clipdit --help` answers at once.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import tyro

GROUP = "clipdit.commands"
DONE, FAULT, WRONG_INPUT, QUARANTINED, CHECK_FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141
"""Exit codes; WRONG_INPUT covers options and files, FAULT is a mistake of ours."""

Verb = Callable[..., int | None]
Verbs = Mapping[str, Callable[[], Verb | dict[str, Verb]]]
"""Verbs by name, each behind the call that loads it."""


class UsageError(ValueError):
    """The command line itself cannot be understood."""


def main(argv: Sequence[str] | None = None, *, verbs: Verbs | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `clipdit`; None is what this process was started with.
        verbs: None is the entry points of `GROUP`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = words[:1] == ["--traceback"]
    try:
        with _logging_to_stderr():
            code = _dispatch(words[show_traceback:], installed_verbs() if verbs is None else verbs)
            sys.stdout.flush()  # here, where a reader who left can still be answered
            return code
    except KeyboardInterrupt:
        print("clipdit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, as `| head` does. Without this Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"clipdit: {_one_line(error)}", file=sys.stderr)
        return WRONG_INPUT


def script() -> NoReturn:
    """`clipdit` in a shell: `main`, and the process ends with its code.

    At once where a daemon of ours (`clipdit-...`) still computes, as of a model that hangs or is being opened: Python would take
    the libraries down under it, and C++ answer with SIGABRT.
    """
    code = main()
    if any(thread.daemon and thread.name.startswith("clipdit-") for thread in threading.enumerate()):
        logging.shutdown()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def takes_argv(verb: Callable[[list[str]], int | None]) -> Verb:
    """Mark a verb that reads its own argument list; it is called with that list as its only argument."""
    verb.__dict__["takes_argv"] = True
    return verb


@contextlib.contextmanager
def parse_errors_on_one_line(prog: str) -> Iterator[None]:
    """Around a tyro parse: its boxed complaint becomes a UsageError of one line. Around the parse only, not around the work."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_first_statement(complaint.getvalue())}. See `{prog} --help`") from None
    sys.stderr.write(complaint.getvalue())


def installed_verbs() -> Verbs:
    """Every verb that this installation knows; none is loaded."""
    return {entry.name: entry.load for entry in sorted(importlib.metadata.entry_points(group=GROUP))}


def load_verb(verbs: Verbs, name: str) -> dict[str, Verb]:
    """What is under one name, by the word that follows it: {"": verb} for a plain verb.

    UsageError when it needs a package that is not installed.
    """
    try:
        loaded = verbs[name]()
        nested = loaded if isinstance(loaded, dict) else {"": loaded}
        for added in verbs:
            if added.startswith(f"{name}."):
                more = verbs[added]()
                assert not isinstance(more, dict), f"the entry point {added} holds several verbs; wanted a function"
                nested = nested | {added.removeprefix(f"{name}."): more}
    except ModuleNotFoundError as error:
        raise UsageError(f"`{name}` needs the Python package `{error.name}`, which is not installed") from error
    return nested


def names_of(verbs: Verbs) -> list[str]:
    """What may stand behind `clipdit`."""
    return [name for name in verbs if "." not in name]


def parse(prog: str, verb: Verb, arguments: Sequence[str]) -> Callable[[], int | None]:
    """The call that a verb's arguments ask for. UsageError for arguments it does not take; SystemExit after printing --help."""

    @functools.wraps(verb)
    def call_later(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(verb, *args, **kwargs)

    with parse_errors_on_one_line(prog):
        return tyro.cli(call_later, prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def _dispatch(words: list[str], verbs: Verbs) -> int:
    """Answer --help and --version, else find the verb, parse its arguments and call it. Returns the exit code."""
    match words:
        case []:
            raise UsageError("no verb given; see `clipdit --help`")
        case ["-h" | "--help", *_]:
            print(_overview(verbs))
            return DONE
        case ["--version", *_]:
            print(f"clipdit {importlib.metadata.version('clipdit')}")
            return DONE
        case [name, *_] if name not in (known := names_of(verbs)):
            raise UsageError(f"{name} is no verb; there are {', '.join(known)}")
    name, *rest = words
    prog = f"clipdit {name}"
    nested = load_verb(verbs, name)
    if rest and rest[0] in nested:
        sub, *rest = rest
        return _run(f"{prog} {sub}", nested[sub], rest)
    if "" in nested:
        return _run(prog, nested[""], rest)
    if rest and rest[0] in ("-h", "--help"):
        print("\n".join([f"usage: {prog} VERB ...", "", *_table(_summaries(verbs, name))]))
        return DONE
    known = ", ".join(f"`{prog} {sub}`" for sub in nested)
    raise UsageError(f"`{' '.join([prog, *rest[:1]])}` is no verb; there are {known}")


def _run(prog: str, verb: Verb, arguments: list[str]) -> int:
    """Parse a verb's arguments and call it. Returns the exit code."""
    _quiet_libraries()
    try:
        call = functools.partial(verb, arguments) if getattr(verb, "takes_argv", False) else parse(prog, verb, arguments)
        return call() or DONE
    except SystemExit as stop:  # tyro's --help ends with None; whatever else exits has already said why
        return stop.code if isinstance(stop.code, int) else FAULT if stop.code else DONE


def _overview(verbs: Verbs) -> str:
    about = importlib.metadata.metadata("clipdit")["Summary"]
    summaries = {label: summary for name in names_of(verbs) for label, summary in _summaries(verbs, name).items()}
    options = {"--traceback": "before the verb: show where an error came from", "--version": "print the version"}
    return "\n".join(
        [
            "usage: clipdit VERB ...",
            "",
            about,
            "",
            *_table(summaries | options),
            "",
            "`clipdit VERB --help` tells a verb's options.",
        ]
    )


def _summaries(verbs: Verbs, name: str) -> dict[str, str]:
    """The verbs under one name: their words, and the first line of their docstrings."""
    try:
        nested = load_verb(verbs, name)
    except UsageError as error:  # an optional part is not installed: the other verbs still deserve their help
        return {name: f"({error})"}
    return {f"{name} {sub}".rstrip(): (inspect.getdoc(verb) or "").split("\n")[0] for sub, verb in nested.items()}


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {label:<{width}}  {text}" for label, text in rows.items()]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _first_statement(box: str) -> str:
    """The first statement in tyro's box, and the spelling it proposes, on one line.

    ╭─ Unrecognized options ───────╮
    │ Unrecognized options: --stps │   (where standard output is not UTF-8 there is no frame, and
    │ ──────────────────────────── │    the title is a section of its own)
    │ Perhaps you meant:           │   ->   Unrecognized options: --stps (perhaps --steps INT)
    │     --steps INT              │
    """
    framed = box.startswith("╭")
    lines = [line.strip(" │") for line in box.splitlines()[framed:]]
    sections = [[]]
    for line in lines:
        if set(line) <= set("─-╰╯"):
            sections.append([])
        else:
            sections[-1].append(line)
    texts = [" ".join(section) for section in sections if section]
    statement = next(iter(texts if framed else texts[1:]), " ".join(texts)).rstrip(".")
    proposals = [section[1] for section in sections if section[:1] == ["Perhaps you meant:"]]
    return f"{statement} (perhaps {proposals[0]})" if proposals else statement


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Our own loggers, those of every package that brings a verb, from INFO, everybody else's from WARNING, as bare lines on
    standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    packages = {entry.value.partition(".")[0] for entry in importlib.metadata.entry_points(group=GROUP)}
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in {"clipdit", *packages}]
    before = [logger.level for logger in ours]
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip(ours, before, strict=True):
            logger.setLevel(level)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _quiet_libraries() -> None:
    """Say to the libraries that a verb may load what a log file needs; whoever has set these variables keeps the last word."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
