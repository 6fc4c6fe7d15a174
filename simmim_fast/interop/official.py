"""Checkpoints of the official pre-training scripts (``main_simmim.py``, ``main_simmim_pt.py``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simmim_fast.interop.unpickle import read_checkpoint
from simmim_fast.models import SimMIM, build_simmim


def load_official(
    path: str | os.PathLike[str], *, config: str | os.PathLike[str] | Mapping[str, Any] | None = None
) -> SimMIM:
    """Builds the model of an official pre-training checkpoint and loads its weights, strictly.

    The file's ``config`` says what to build and its ``model`` holds the weights. yacs is not needed, and nothing that
    the file's pickle asks for is run (`simmim_fast.interop.read_checkpoint`). Of the optimizer, which is two thirds of
    such a file, nothing is loaded.

    Args:
        path: File as the official ``save_checkpoint`` writes it.
        config: Official configuration (YAML path, mapping or yacs node) to use instead of the file's own.

    Returns:
        The model as newly built: on the CPU, in fp32 and in training mode (``.eval()`` turns stochastic depth off).

    Raises:
        UnsafePickleError: the pickle asks for something to be run; the message names it.
        ValueError: not a checkpoint, not one of SimMIM pre-training, no usable configuration, or weights that do not
            fit it.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    checkpoint = read_checkpoint(path)
    weights = _pretraining_weights(checkpoint, path)
    config = _own_config(checkpoint, path) if config is None else config
    try:
        model = build_simmim(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: no model can be built from its configuration: {error}") from error
    _check_fit(weights, model.state_dict(), path)
    model.load_state_dict(weights, strict=True)
    return model


def _pretraining_weights(checkpoint: Any, path: str) -> dict[str, Tensor]:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: an official checkpoint holds a dict, this one a {type(checkpoint).__name__}")
    weights = checkpoint.get("model")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: no state dict under 'model', only the entries {_few(list(checkpoint))}")
    other = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path}: the entries {_few(other)} of 'model' are not named tensors")
    sections = {key.partition(".")[0] for key in weights}
    if not sections >= {"encoder", "decoder"}:
        kind = "the weights of a fine-tuned classifier (head.*)" if "head" in sections else "no SimMIM weights"
        raise ValueError(f"{path}: 'model' holds {kind}, expected encoder.* and decoder.*, got {_few(weights)}")
    # SwinV2 checkpoints of before the official renaming (Swin-Transformer, utils_simmim.py).
    return {key.replace("rpe_mlp", "cpb_mlp"): value for key, value in weights.items()}


def _own_config(checkpoint: Mapping[Any, Any], path: str) -> Mapping[str, Any]:
    config = checkpoint.get("config")
    if not isinstance(config, Mapping) or "MODEL" not in config:
        raise ValueError(f"{path}: no official configuration under 'config'; pass config= (an official YAML file)")
    return config


def _check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> None:
    """Raises unless `weights` has the keys and shapes of `expected`."""
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    reshaped = [
        f"{key} {tuple(weights[key].shape)} for {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    told = "; ".join(f"{len(keys)} {problem}: {_few(keys)}" for problem, keys in problems.items() if keys)
    if told:
        raise ValueError(f"{path}: the weights do not fit the configuration: {told}")


def _few(names: Any, count: int = 4) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
