"""masked_patch_embed: what its backends take, what they cost, and what the compiler makes of its Triton kernels."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast.ops import bytes_loaded, bytes_moved, flops, register_flop_formulas
from simmim_fast.ops.masked_patch_embed import reference
from simmim_fast.ops.masked_patch_embed.op import MAX_NORM_CHANNELS, chunk_rows, row_tile, size_refusal
from simmim_fast.testing import masked_patch_embed_inputs as make_inputs
from simmim_fast.testing import offline
from tests.ops.masked_patch_embed_operators import operator_arguments, operators
from tests.ops.targets import Target

BF16, FP32 = torch.bfloat16, torch.float32


def test_says_which_sizes_it_takes() -> None:
    wide = MAX_NORM_CHANNELS + 1
    assert "at most 1024 channels; got 1025" in size_refusal("triton", channels=wide, norm=True)
    assert size_refusal("triton", channels=wide, norm=False) is None
    assert size_refusal("native", channels=wide, norm=True) is None


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("live", [1, 3], ids=["forward", "backward"])
def test_warps_are_a_power_of_two(live: int, dtype: torch.dtype) -> None:
    warps = {
        row_tile(torch.empty(channels, 48, device="meta"), dtype, norm, live).num_warps
        for channels in (1, 96, 128, 192, 256, 384, 512, 768, MAX_NORM_CHANNELS)
        for norm in (True, False)
    }
    assert warps <= {4, 8, 16}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_cost_formulas(norm: bool) -> None:
    from simmim_fast.ops.masked_patch_embed import kernels

    forward, backward = operators(Target("triton"))
    inputs = make_inputs((20, 8, 8, 3, 4, 32), BF16, FP32, norm=norm, visible=True, device="meta")
    arguments, backward_arguments = operator_arguments(inputs, BF16, FP32)
    rows, product = inputs["visible"].numel(), 2 * inputs["visible"].numel() * 32 * 48
    register_flop_formulas()
    for operator, call, products in ((forward, arguments, 1), (backward, backward_arguments, 1 + norm)):
        with FlopCounterMode(display=False) as counter:
            operator(*call)
        assert counter.get_total_flops() == products * product

    assert bytes_moved(forward, *arguments)[1] == forward(*arguments).nbytes + rows * 32 * 4

    # What the launcher allocates, beside what it returns, is written once; and so is the float32 sum of the bf16
    # weight's gradient.
    pointers = {}
    for launch in offline.launches(kernels.backward, *backward_arguments):
        pointers |= {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    workspace = sum(value.nbytes for name, value in pointers.items() if "partial" in name or "rows" in name)
    workspace += 4 * inputs["weight"].numel()
    gradients = backward(*backward_arguments)
    assert bytes_moved(backward, *backward_arguments)[1] == workspace + sum(gradient.nbytes for gradient in gradients)
    assert chunk_rows(rows, inputs["weight"]) == 256


@pytest.mark.parametrize(
    ("model", "shape", "hidden", "norm"),
    [
        ("Swin-B 192, out (64, 48, 48, 128)", (64, 48, 48, 3, 4, 128), 22 / 36, True),
        ("ViT-B 224, out (64, 14, 14, 768)", (64, 14, 14, 3, 16, 768), 30 / 49, False),
    ],
    ids=["swin", "vit"],
)
def test_readme_states_the_bytes(model: str, shape: tuple, hidden: float, norm: bool) -> None:
    forward, backward = operators(Target("triton"))
    inputs = make_inputs(shape, norm=norm, pos_embed=False, visible=True, hidden=hidden, device="meta")
    arguments, backward_arguments = operator_arguments(inputs, BF16, FP32)
    readme = Path(reference.__file__).with_name("README.md").read_text()
    for direction, operator, call in (("forward", forward, arguments), ("backward", backward, backward_arguments)):
        results = operator(*call)
        tensors = (*call, *(results if isinstance(results, tuple) else (results,)))
        least = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        least -= int(hidden * inputs["image"].nbytes)
        read, written = bytes_moved(operator, *call)
        nbytes = (read + written, bytes_loaded(operator, *call) + written, least)
        figures = (*(number / 1e6 for number in nbytes), flops(operator, *call) / 1e9)
        row = f"| {model} | {direction} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |"
        assert row in readme, row


SHAPES = {"swin-b": (8, 48, 48, 3, 4, 128), "vit-b": (8, 14, 14, 3, 16, 768), "swin-l": (8, 48, 48, 3, 4, 192)}
COMPILED = [
    pytest.param("swin-b", BF16, 90),
    *(pytest.param("swin-b", BF16, capability, marks=pytest.mark.slow) for capability in (80, 100)),
    *(pytest.param("swin-b", FP32, capability, marks=pytest.mark.slow) for capability in offline.CAPABILITIES),
    pytest.param("vit-b", BF16, 90, marks=pytest.mark.slow),
    pytest.param("swin-l", BF16, 80, marks=pytest.mark.slow),
]


@pytest.mark.compiles(5)
@pytest.mark.parametrize(("model", "dtype", "capability"), COMPILED, ids=str)
def test_triton_kernels_compile(model: str, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    from simmim_fast.ops.masked_patch_embed import kernels

    norm = model != "vit-b"
    inputs = make_inputs(SHAPES[model], dtype, FP32, norm=norm, pos_embed=not norm, visible=True, device="meta")
    arguments, backward_arguments = operator_arguments(inputs, dtype, FP32)
    launches = offline.launches(kernels.forward, *arguments) + offline.launches(kernels.backward, *backward_arguments)
    dots = {"fwd": 1, "bwd_norm": 1, "bwd_weight": 1}
    for launch in launches:
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        kernel = launch.kernel.__name__.removeprefix("_masked_patch_embed_").removesuffix("_kernel")
        offline.assert_products(compiled, dtype, dots.get(kernel, 0))
        loaded, stored = least_wide_bytes(kernel, launch)
        assert compiled.wide_bytes("LDG") + compiled.wide_bytes("LDGSTS") >= loaded, kernel
        assert compiled.wide_bytes("STG") >= stored, kernel


def least_wide_bytes(kernel: str, launch: offline.Launch) -> tuple[float, float]:
    """Bytes of the tiles that a thread has to load and to store by 128 bits: all but pixels, masks and vectors."""

    def tile(name: str, sides: str) -> float:
        tensor = launch.arguments[f"{name}_ptr"]
        elements = prod(launch.arguments[f"TILE_{side}"] for side in sides)
        return 0 if tensor is None else elements * tensor.itemsize / launch.threads

    return {
        "fwd_hidden": lambda: (tile("pos_embed", "PC"), tile("out", "PC")),
        "fwd": lambda: (tile("weight", "CD") + tile("pos_embed", "RC"), tile("out", "RC")),
        "bwd_tokens": lambda: (tile("grad_out", "PC"), tile("pos_partial", "PC")),
        "bwd_norm": lambda: (tile("weight", "CD") + tile("grad_out", "RC"), tile("grad_rows", "RC")),
        "bwd_weight": lambda: (tile("grad_rows", "RC") or tile("grad_out", "RC"), tile("weight_partial", "CD")),
    }[kernel]()
