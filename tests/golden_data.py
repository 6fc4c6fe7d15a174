"""Reads tests/golden: what the official code computes (README there)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from simmim_fast import create_model
from simmim_fast.models import SimMIM

FOLDER = Path(__file__).parent / "golden"
PARITY_CASES = (
    "swin_window6_img96_mask8",
    "swinv2_window6_img96_norm_target",
    "vit_abs_pos_img64",
    "vit_shared_rpb_img64",
)
COMPUTED_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
NOT_ARGUMENTS = (
    *("encoder_stride", "mask_patch_size", "mask_ratio", "layer_norm_eps", "loss", "computed_in"),
    *("optimizer", "schedule", "clip_grad", "steps", "lr", "grad_norm"),
)


def read_json(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def read_case(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a golden file, and its `case` metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        case = json.loads(file.metadata()["case"]) if file.metadata() else {}
    if "grad.decoder.0.weight.left" in tensors:
        product = (
            tensors.pop("grad.decoder.0.weight.left").double() @ tensors.pop("grad.decoder.0.weight.right").double()
        )
        tensors["grad.decoder.0.weight"] = product[:, :, None, None]
    return tensors, case


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Load golden weights; only the buffers that the model computes may be missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith(COMPUTED_BUFFERS) for key in missing), missing


def build_case(tensors: dict[str, Tensor], case: dict, **overrides: object) -> SimMIM:
    """The model of a golden case in float64, with its weights."""
    arguments = {k: v for k, v in case.items() if k not in NOT_ARGUMENTS}
    if case["encoder"] == "vit":
        arguments["qkv_bias"] = True  # the official configuration's default
    model = create_model(**arguments, drop_path_rate=0.0, **overrides)
    model.double()
    load_weights(model, with_prefix(tensors, "weight"))
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance in float64; the absolute one where the expectation is all zero."""
    expected = expected.double()
    norm = expected.norm().item()
    return (actual.double() - expected).norm().item() / (norm if norm else 1.0)
