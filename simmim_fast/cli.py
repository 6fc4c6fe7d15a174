"""The command line: `simmim-fast pretrain | reconstruct | info`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import Namespace

import simmim_fast
from simmim_fast._arguments import check_choice, renamed
from simmim_fast.train.options import OptionParser, add_config, config_from
from simmim_fast.train.run import LOSS_PLOT, PICTURE, UNREADABLE

if TYPE_CHECKING:
    from simmim_fast.train import Job

# Exit codes: what was asked for is wrong; it was right, and failed; Ctrl-C.
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# Unreadable images that are named on the terminal; unreadable.txt names them all.
MOST_NAMED = 20
# Images of the run's own folder in its reconstruction.png.
PICTURED = 8

Command = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `simmim-fast` and returns its exit code. An error is one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _prepare(arguments)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, argparse.ArgumentError) as error:
        return _fail(error, BAD_INPUT)
    try:
        command()
    except (FloatingPointError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "stopped by Ctrl-C", INTERRUPTED)
    return 0


def _fail(error: object, code: int) -> int:
    print(f"simmim-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _prepare(arguments: list[str]) -> Command:
    """Parses the command line and checks what it asks for; the result does it."""
    official, arguments = _split_official(arguments)
    parsers = {"pretrain": _pretrain_parser(), "reconstruct": _reconstruct_parser(), "info": _info_parser()}
    first = arguments[0] if arguments else None
    if first is None or not first.startswith("-"):
        check_choice("the command", first, parsers)
    parsers["pretrain"].set_defaults(official.options)
    parser = OptionParser(
        prog="simmim-fast",
        description="SimMIM pre-training with fused kernels.",
        version=simmim_fast.__version__,
    )
    commands = parser.add_subcommands()
    for name, subparser in parsers.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    options = parser.parse_args(arguments)
    name = options.subcommand
    prepare = {"pretrain": _prepare_pretrain, "reconstruct": _prepare_reconstruct, "info": _prepare_info}[name]
    with renamed({option: f"{option} ({key})" for option, key in official.names.items()}):
        command = prepare(options[name], parsers[name])
    if official.ignored:
        print(f"--cfg: without effect on pre-training: {', '.join(official.ignored)}")
    return command


class _Official(NamedTuple):
    """What --cfg and --opts say: options by our names, the official key behind each, and keys without effect."""

    options: Mapping[str, Any]
    names: Mapping[str, str]
    ignored: Sequence[str]


def _split_official(arguments: list[str]) -> tuple[_Official, list[str]]:
    """What --cfg and --opts say, and the command line without them."""
    if arguments[:1] != ["pretrain"]:
        return _Official({}, {}, ()), arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cfg")
    parser.add_argument("--opts", nargs="*", default=[])
    official, rest = parser.parse_known_args(arguments)
    if official.cfg is None and official.opts:
        raise ValueError("--opts changes the file that --cfg names, got no --cfg")
    if official.cfg is None:
        return _Official({}, {}, ()), rest
    from simmim_fast.train.official import ignored_keys, official_names, read_official_options

    source = official.cfg, official.opts
    return _Official(read_official_options(*source), official_names(*source), ignored_keys(*source)), rest


def _pretrain_parser() -> OptionParser:
    parser = OptionParser(description="Pre-train a model on a folder of images.")
    # Taken from the command line before this parser sees it: they set the defaults of the options below.
    parser.add_argument(
        "--cfg", type=str, default=argparse.SUPPRESS, help="official YAML file, which the options below override"
    )
    parser.add_argument(
        "--opts", type=str, nargs="*", default=argparse.SUPPRESS, help="official KEY VALUE pairs that change --cfg"
    )
    # Not part of a configuration: without a default, --print_config leaves it out.
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=argparse.SUPPRESS,
        help="replace the run that the output folder holds",
    )
    add_config(parser)
    return parser


def _prepare_pretrain(options: Namespace, parser: OptionParser) -> Command:
    _require("torchvision", "PIL", "rich", "matplotlib")
    from simmim_fast.train import prepare

    if "cfg" in options or "opts" in options:
        raise ValueError("cfg and opts belong on the command line, got them in a --config file")
    return partial(_pretrain, prepare(config_from(options, parser), overwrite=options.get("overwrite", False)))


def _pretrain(job: Job) -> None:
    from simmim_fast.report import plot_run, reconstruct_images
    from simmim_fast.train import train

    try:
        checkpoint = train(job)
    finally:
        _name_unreadable(job.updates.unreadable)
    out, count = job.folder.path, min(len(job.dataset), PICTURED)
    readable = [job.dataset[number * len(job.dataset) // count].index for number in range(count)]
    plot_run(out)
    result = reconstruct_images(
        checkpoint,
        [job.dataset.path(index) for index in readable],
        out / PICTURE,
        title="Images of the training folder",
        device=job.config.device,
    )
    print(f"{result.summary()}\ncheckpoint: {checkpoint}\npictures: {out / LOSS_PLOT} {out / PICTURE}")


def _name_unreadable(unreadable: Mapping[str, str]) -> None:
    if not unreadable:
        return
    print(f"{len(unreadable)} images could not be read; others took their place:")
    for path, reason in sorted(unreadable.items())[:MOST_NAMED]:
        print(f"  {path}: {reason}")
    if len(unreadable) > MOST_NAMED:
        print(f"  and {len(unreadable) - MOST_NAMED} more, listed in {UNREADABLE}")


def _reconstruct_parser() -> OptionParser:
    parser = OptionParser(description="Draw what a trained model makes of the hidden cells of images.")
    parser.add_argument("checkpoint", type=str, help="folder of a checkpoint, or of a run (its newest checkpoint)")
    parser.add_argument("images", type=str, nargs="+", help="image files")
    parser.add_argument("--out", type=str, default="reconstruction.png", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    return parser


def _prepare_reconstruct(options: Namespace, parser: OptionParser) -> Command:
    _require("torchvision", "PIL", "matplotlib")
    from simmim_fast.report import reconstruct_images

    result = reconstruct_images(
        options.checkpoint, options.images, options.out, seed=options.seed, device=options.device
    )
    return partial(print, f"{result.summary()}\npicture: {options.out}")


def _info_parser() -> OptionParser:
    parser = OptionParser(description="Show what is installed, which backends can run, and why others cannot.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _prepare_info(options: Namespace, parser: OptionParser) -> Command:
    from simmim_fast.info import collect, render

    facts = collect()
    return partial(print, json.dumps(facts, indent=2) if options.json else render(facts))


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"this needs {', '.join(missing)}: pip install 'simmim_fast[train]'")
