"""The configuration as command-line options and as YAML, both ways.

An option of a sub-configuration is spelt `--optimizer.lr` on the command line and nested in YAML. Names are taken as
they stand, never as prefixes, and an unknown one is answered with the nearest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from simmim_fast._arguments import did_you_mean, mismatch
from simmim_fast.train.config import PretrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# How jsonargparse tells of a wrong value, of missing ones, and of an option that it does not know, typed or in a file.
_WRONG = re.compile(r'Parser key "(?P<name>[^"]+)": .*(Got|Given) value: (?P<value>.*)')
_MISSING = re.compile(r"arguments are required: (?P<names>.*)")
_UNKNOWN = re.compile(
    r"unrecognized arguments: -*(?P<flag>[^\s=]+)|(Group '(?P<group>.+)' .*)?option '(?P<key>.+)'", re.I
)


class OptionParser(ArgumentParser):
    """jsonargparse's parser without prefix matching, whose every error is a ValueError or TypeError of one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        actions = {action.dest: action for action in self._actions}
        if (wrong := _WRONG.search(message)) and hasattr(actions.get(wrong["name"]), "_typehint"):
            raise mismatch(wrong["name"], wrong["value"], actions[wrong["name"]]._typehint) from ex
        if missing := _MISSING.search(message):
            names = (name.rpartition(".")[2] for name in missing["names"].split(", "))
            raise ValueError(f"{' and '.join(names)} must be given, got nothing") from ex
        if unknown := _UNKNOWN.search(message):
            name = unknown["flag"] or ".".join(filter(None, (unknown["group"], unknown["key"])))
            raise ValueError(f"unknown option {name}{did_you_mean(name, list(_option_names(self)))}") from ex
        raise ValueError(re.sub('Parser key "([^"]+)"', r"\1", message)) from ex


def _option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        if isinstance(action.choices, Mapping):  # the subcommands
            for subparser in action.choices.values():
                yield from _option_names(subparser)


def add_config(parser: ArgumentParser) -> None:
    """Adds every option of `PretrainConfig` to a parser, and `--config` for a YAML file of them."""
    parser.add_argument("--config", action="config", help="YAML file with any of these options; later flags win")
    parser.add_class_arguments(PretrainConfig, as_group=False)


def config_from(options: Namespace, parser: ArgumentParser) -> PretrainConfig:
    """The configuration in the parsed options of a parser with `add_config`."""
    values = parser.instantiate(options)
    return PretrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(PretrainConfig)})


def read_config(path: str | os.PathLike[str]) -> PretrainConfig:
    """Reads a configuration from a YAML file.

    Raises:
        ValueError, TypeError: not YAML, an unknown option (with the nearest name), a missing one or a wrong value.
        OSError: the file cannot be read.
    """
    parser = OptionParser()
    add_config(parser)
    with open(path, encoding="utf-8") as file:
        return config_from(parser.parse_string(file.read(), path=path), parser)


def dump_config(config: PretrainConfig) -> str:
    """The configuration as YAML that `read_config` and `--config` take."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
