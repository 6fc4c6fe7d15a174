"""The configuration format of the official repositories: YAML files, ``--opts`` and yacs nodes, read without yacs.

Sources: ``config.py`` of microsoft/SimMIM and of microsoft/Swin-Transformer (yacs 0.1.8 semantics).
"""

from __future__ import annotations

import ast
import copy
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from simmim_fast._arguments import did_you_mean

_SWIN_BASE = {
    "PATCH_SIZE": 4,
    "IN_CHANS": 3,
    "EMBED_DIM": 96,
    "DEPTHS": [2, 2, 6, 2],
    "NUM_HEADS": [3, 6, 12, 24],
    "WINDOW_SIZE": 7,
    "MLP_RATIO": 4.0,
    "APE": False,
    "PATCH_NORM": True,
}
_SWIN = {**_SWIN_BASE, "QKV_BIAS": True, "QK_SCALE": None}
_SWINV2 = {**_SWIN_BASE, "QKV_BIAS": True, "PRETRAINED_WINDOW_SIZES": [0, 0, 0, 0]}
_SWIN_MOE = {
    **_SWIN,
    "PRETRAINED_WINDOW_SIZES": [0, 0, 0, 0],
    "MLP_FC2_BIAS": True,
    "INIT_STD": 0.02,
    "MOE_BLOCKS": [[-1], [-1], [-1], [-1]],
    "NUM_LOCAL_EXPERTS": 1,
    "TOP_VALUE": 1,
    "CAPACITY_FACTOR": 1.25,
    "COSINE_ROUTER": False,
    "NORMALIZE_GATE": False,
    "USE_BPR": True,
    "IS_GSHARD_LOSS": False,
    "GATE_NOISE": 1.0,
    "COSINE_ROUTER_DIM": 256,
    "COSINE_ROUTER_INIT_T": 0.5,
    "MOE_DROP": 0.0,
    "AUX_LOSS_WEIGHT": 0.01,
}
_VIT = {
    "PATCH_SIZE": 16,
    "IN_CHANS": 3,
    "EMBED_DIM": 768,
    "DEPTH": 12,
    "NUM_HEADS": 12,
    "MLP_RATIO": 4,
    "QKV_BIAS": True,
    "INIT_VALUES": 0.1,
    "USE_APE": False,
    "USE_RPB": False,
    "USE_SHARED_RPB": True,
    "USE_MEAN_POOLING": False,
}
_DATA = {
    "BATCH_SIZE": 128,
    "DATA_PATH": "",
    "DATASET": "imagenet",
    "IMG_SIZE": 224,
    "INTERPOLATION": "bicubic",
    "ZIP_MODE": False,
    "CACHE_MODE": "part",
    "PIN_MEMORY": True,
    "NUM_WORKERS": 8,
    "MASK_PATCH_SIZE": 32,
    "MASK_RATIO": 0.6,
}
_MODEL = {
    "TYPE": "swin",
    "NAME": "swin_tiny_patch4_window7_224",
    "PRETRAINED": "",
    "RESUME": "",
    "NUM_CLASSES": 1000,
    "DROP_RATE": 0.0,
    "DROP_PATH_RATE": 0.1,
    "LABEL_SMOOTHING": 0.1,
    "SWIN": _SWIN,
    "SWINV2": _SWINV2,
    "SWIN_MOE": _SWIN_MOE,
    "SWIN_MLP": _SWIN_BASE,
    "VIT": _VIT,
    "SIMMIM": {"NORM_TARGET": {"ENABLE": False, "PATCH_SIZE": 47}},
}
_TRAIN = {
    "START_EPOCH": 0,
    "EPOCHS": 300,
    "WARMUP_EPOCHS": 20,
    "WEIGHT_DECAY": 0.05,
    "BASE_LR": 5e-4,
    "WARMUP_LR": 5e-7,
    "MIN_LR": 5e-6,
    "CLIP_GRAD": 5.0,
    "AUTO_RESUME": True,
    "ACCUMULATION_STEPS": 0,
    "USE_CHECKPOINT": False,
    "LR_SCHEDULER": {
        "NAME": "cosine",
        "DECAY_EPOCHS": 30,
        "DECAY_RATE": 0.1,
        "WARMUP_PREFIX": True,
        "GAMMA": 0.1,
        "MULTISTEPS": [],
    },
    "OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": (0.9, 0.999), "MOMENTUM": 0.9},
    "LAYER_DECAY": 1.0,
    "MOE": {"SAVE_MASTER": False},
}
_AUG = {
    "COLOR_JITTER": 0.4,
    "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "REPROB": 0.25,
    "REMODE": "pixel",
    "RECOUNT": 1,
    "MIXUP": 0.8,
    "CUTMIX": 1.0,
    "CUTMIX_MINMAX": None,
    "MIXUP_PROB": 1.0,
    "MIXUP_SWITCH_PROB": 0.5,
    "MIXUP_MODE": "batch",
}
_DEFAULTS: dict[str, Any] = {
    "BASE": [""],
    "DATA": _DATA,
    "MODEL": _MODEL,
    "TRAIN": _TRAIN,
    "AUG": _AUG,
    "TEST": {"CROP": True, "SEQUENTIAL": False, "SHUFFLE": False},
    "ENABLE_AMP": False,
    "AMP_ENABLE": True,
    "AMP_OPT_LEVEL": "",
    "OUTPUT": "",
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
    "LOCAL_RANK": 0,
    "PRETRAINED": "",
    "FUSED_WINDOW_PROCESS": False,
    "FUSED_LAYERNORM": False,
}


class OfficialConfig(Mapping[str, Any]):
    """A complete, read-only official configuration: ``config.MODEL.SWIN.EMBED_DIM`` or ``config["MODEL"]["SWIN"]``.

    Sections are `OfficialConfig` themselves. To change values, read it again with options:
    ``read_official_config(config, ["TRAIN.EPOCHS", 100])``.
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any]) -> None:
        nested = {
            key: OfficialConfig(value) if isinstance(value, Mapping) else copy.deepcopy(value)
            for key, value in values.items()
        }
        object.__setattr__(self, "_values", nested)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(
                f"the configuration has no key {name}{did_you_mean(name.upper(), self._values)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be set: an OfficialConfig is read-only; use read_official_config's opts")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __reduce__(self) -> tuple[type[OfficialConfig], tuple[dict[str, Any]]]:
        return OfficialConfig, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"OfficialConfig(\n{_indented(self)}\n)"

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as new plain nested dicts."""
        return {
            key: value.to_dict() if isinstance(value, OfficialConfig) else copy.deepcopy(value)
            for key, value in self._values.items()
        }


def read_official_config(
    config: str | os.PathLike[str] | Mapping[str, Any], opts: Sequence[Any] = ()
) -> OfficialConfig:
    """Reads a configuration of the official scripts and completes it with their defaults.

    The defaults are those of both official repositories together; where they disagree (TRAIN.ACCUMULATION_STEPS, 0
    in one and 1 in the other, with the same meaning) that of microsoft/SimMIM, 0, holds. Text is decoded as yacs does
    (``1e-4``, which YAML 1.1 reads as text, becomes a float), and a value must have the type of the one it replaces.
    Exceptions, as in yacs: list and tuple convert, None replaces anything and anything plain replaces None. Beyond
    yacs, an int converts to float, and text that looks like a number may replace text (``TAG: "42"``).

    Args:
        config: Path of an official YAML file, whose ``BASE`` files, relative to it, are read first; or a mapping such
            as a nested dict or a yacs node, whose ``BASE`` is not followed, as a node is complete.
        opts: Keys and values in turn, as the official ``--opts``: ``["TRAIN.EPOCHS", "100", "MODEL.TYPE", "vit"]``.

    Raises:
        TypeError: a value of a wrong type, or `config` neither a path nor a mapping.
        ValueError: an unknown key, an odd number of opts, a YAML file with tags or errors, or files whose ``BASE``
            entries lead back to themselves.
        OSError: a file cannot be read.
    """
    values = copy.deepcopy(_DEFAULTS)
    if isinstance(config, Mapping):
        _merge(config, values, "config")
    elif isinstance(config, (str, os.PathLike)):
        for path, layer in _yaml_layers(Path(config)):
            _merge(layer, values, str(path))
    else:
        raise TypeError(f"config must be a path, a mapping or a yacs node, got {type(config).__name__}")
    _merge_opts(opts, values)
    return OfficialConfig(values)


def changed_keys(config: OfficialConfig) -> list[str]:
    """Dotted names of the keys whose values are not the official defaults."""
    defaults = OfficialConfig(_DEFAULTS)
    keys = [key for key in _dotted_keys(_DEFAULTS) if not isinstance(value_of(defaults, key), Mapping)]
    return [key for key in keys if value_of(config, key) != value_of(defaults, key)]


def value_of(config: OfficialConfig, key: str) -> Any:
    """The value of a dotted key such as "MODEL.SWIN.EMBED_DIM"."""
    return reduce(getitem, key.split("."), config)


def _merge(new: Mapping[str, Any], values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Writes `new` into `values`, checking keys and types; `source` names the origin in errors."""
    for name, value in new.items():
        key = f"{prefix}{name}"
        if name not in values:
            raise ValueError(f"{source}: unknown key {key}{did_you_mean(key.upper(), list(_dotted_keys(_DEFAULTS)))}")
        if not isinstance(values[name], dict):
            values[name] = _converted(value, values[name], source, key)
        elif isinstance(value, Mapping):
            _merge(value, values[name], source, f"{key}.")
        else:
            raise TypeError(f"{source}: {key} is a section of keys, got {_described(value)}")


def _merge_opts(opts: Sequence[Any], values: dict[str, Any]) -> None:
    if isinstance(opts, str) or len(opts) % 2:
        raise ValueError(f"opts must list keys and values in turn, got {reprlib.repr(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if not isinstance(key, str):
            raise TypeError(f"opts: a key must be a string such as 'TRAIN.EPOCHS', got {_described(key)}")
        nested: Any = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        _merge(nested, values, "opts")


def _converted(value: Any, current: Any, source: str, key: str) -> Any:
    """Returns `value` in the type of `current`."""
    decoded = _decoded(value)
    if decoded is None or type(decoded) is type(current):
        return copy.deepcopy(decoded)
    if current is None and isinstance(decoded, (bool, int, float, str, list, tuple)):
        return copy.deepcopy(decoded)
    if isinstance(current, str) and isinstance(value, str):
        return value
    if isinstance(current, float) and type(decoded) is int:
        return float(decoded)
    if isinstance(current, (list, tuple)) and isinstance(decoded, (list, tuple)):
        return type(current)(copy.deepcopy(decoded))
    expected = "a number, text, list or tuple" if current is None else type(current).__name__
    raise TypeError(f"{source}: {key} must be {expected}, got {_described(decoded)}")


def _decoded(value: Any) -> Any:
    """Text that is a Python literal becomes what it stands for."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _yaml_layers(path: Path, including: tuple[Path, ...] = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yields the ``BASE`` files of a YAML file, each after its own, and then the file itself."""
    resolved = path.resolve()
    if resolved in including:
        raise ValueError(f"{path}: the BASE entries lead back to this file")
    layer = _load_yaml(path)
    bases = layer.get("BASE", [])
    if not isinstance(bases, (list, tuple)) or not all(isinstance(base, str) for base in bases):
        raise TypeError(f"{path}: BASE must be a list of file names, got {_described(bases)}")
    for base in filter(None, bases):
        yield from _yaml_layers(path.parent / base, (*including, resolved))
    yield path, layer


def _load_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            layer = yaml.safe_load(file)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(f"{path}: only plain YAML values are accepted, no tags: {error}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(layer, Mapping):
        raise ValueError(f"{path}: must hold a mapping of keys such as MODEL and DATA, got {_described(layer)}")
    return layer


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{name}.")


def _described(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _indented(config: Mapping[str, Any], indent: str = "  ") -> str:
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", _indented(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value!r}")
    return "\n".join(lines)
