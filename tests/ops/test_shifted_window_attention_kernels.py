"""The kernels of shifted_window_attention: sizes, cost, what the Triton compiler makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast.ops import bytes_loaded, bytes_moved, register_flop_formulas
from simmim_fast.ops.shifted_window_attention import kernels
from simmim_fast.ops.shifted_window_attention.op import size_refusal
from simmim_fast.testing import offline
from tests.ops.shifted_window_operators import operator_arguments, operators
from tests.ops.targets import Target

BF16, FP32 = torch.bfloat16, torch.float32
SHORT = {BF16: "bf16", FP32: "fp32"}
README = Path(kernels.__file__).with_name("README.md").read_text("utf-8")


def test_says_what_its_backends_do_not_take() -> None:
    on_gpu = {"device_type": "cuda", "head_size": 32, "dtype": BF16}
    assert size_refusal("native", device_type="cpu", tokens=10_000, head_size=1000, dtype=BF16) is None
    assert size_refusal("triton", **on_gpu, tokens=256) is None
    assert size_refusal("triton", **on_gpu, tokens=257) == "it takes windows of at most 256 tokens; got 257"
    wide = on_gpu | {"head_size": 128}
    assert size_refusal("triton", **wide, tokens=256) is None
    wider = on_gpu | {"head_size": 129}
    assert size_refusal("triton", **wider, tokens=64) == "it takes heads of at most 128 channels; got 129"
    arguments, backward_arguments = operator_arguments(shape=(1, 17, 16, 1, 4), window_size=(17, 16), device="meta")
    for function, args in ((kernels.forward, arguments), (kernels.backward, backward_arguments)):
        with pytest.raises(RuntimeError, match="triton: it takes windows of at most 256 tokens; got 272"):
            function(*args)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("queries", [None, 22], ids=["all", "queries"])
def test_flop_formulas(backend: str, queries: int | None) -> None:
    forward, backward = operators(Target(backend))
    case = {"shape": (2, 5, 6, 32, 32), "window_size": (6, 6), "queries": queries, "device": "meta"}
    arguments, backward_arguments = operator_arguments(**case)
    product = 2 * 2 * 32 * 32 * 36 * (queries or 36)
    register_flop_formulas()
    for operator, args, products in ((forward, arguments, 2), (backward, backward_arguments, 5)):
        with FlopCounterMode(display=False) as counter:
            operator(*args)
        assert counter.get_total_flops() == products * product


@pytest.mark.parametrize(
    "case",
    [
        {"shape": (64, 12, 12, 4, 32), "window_size": (6, 6), "shift": (3, 3), "cosine": True},
        {"shape": (64, 12, 13, 4, 32), "window_size": (6, 6), "cosine": True},
        {"shape": (64, 6, 6, 4, 32), "window_size": (6, 6), "queries": 22, "cosine": True},
        {"shape": (2, 24, 23, 4, 32), "window_size": (12, 12), "shift": (6, 6), "cosine": True},
    ],
    ids=["shifted", "padded", "queries", "blocks"],
)
def test_bytes_formulas(case: dict) -> None:
    """Beyond arguments and results, the operators move what the launchers allocate."""
    arguments, backward_arguments = operator_arguments(**case, dtype=BF16, parameter_dtype=FP32, device="meta")
    results = {"out_ptr", "grad_qkv_ptr", "grad_table_ptr"}
    summed = {"logit_scale_partial_ptr", "pad_value_partial_ptr"}  # by PyTorch; the sum of the table's goes to a kernel
    launchers = (kernels.forward, kernels.backward)
    for operator, launcher, args in zip(
        operators(Target("triton")), launchers, (arguments, backward_arguments), strict=True
    ):
        workspaces = {
            name: value
            for launch in offline.launches(launcher, *args)
            for name, value in launch.arguments.items()
            if isinstance(value, Tensor)
            and name not in results | {"pad_value_ptr"}
            and not any(value is argument for argument in args)
        }
        allocated = sum(tensor.nbytes for tensor in workspaces.values())
        allocated += sum(workspaces[name][0].nbytes for name in summed & workspaces.keys())
        outputs = operator(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert bytes_moved(operator, *args)[1] == allocated + sum(output.nbytes for output in outputs)


def test_native_forms_no_tensor_beside_its_results(tmp_path: Path) -> None:
    """None that is rolled, or cut into windows, or of the weights (windows, heads, N, N): sums and parameters alone."""
    trace = tmp_path / "trace.json"
    case = {"shape": (4, 24, 23, 2, 8), "window_size": (6, 6), "shift": (3, 3)}
    for operator, args in zip(operators(Target("native")), operator_arguments(**case), strict=True):
        with torch.profiler.profile(profile_memory=True) as profile:
            results = operator(*args)
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
        changes = (event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
        result, *others = sorted((change for change in changes if change > 0), reverse=True)
        assert result == (results if isinstance(results, Tensor) else results[0]).nbytes
        assert sum(others) < result / 10


README_ROWS = [
    pytest.param("Swin-B 192 stage 1", {"shape": (64, 48, 48, 4, 32), "window_size": (6, 6), "shift": (3, 3)}, id="1"),
    pytest.param("Swin-B 192 stage 3", {"shape": (64, 12, 12, 16, 32), "window_size": (6, 6), "shift": (3, 3)}, id="3"),
    pytest.param("Swin-B 192 stage 4", {"shape": (64, 6, 6, 32, 32), "window_size": (6, 6), "queries": 22}, id="4"),
    pytest.param(
        "SwinV2-B 192 stage 1",
        {"shape": (64, 48, 48, 4, 32), "window_size": (12, 12), "shift": (6, 6), "cosine": True},
        id="v2",
    ),
]


@pytest.mark.parametrize(("layer", "case"), README_ROWS)
def test_readme_states_the_bytes(layer: str, case: dict) -> None:
    forward, backward = operators(Target("triton"))
    arguments, backward_arguments = operator_arguments(**case, dtype=BF16, parameter_dtype=FP32, device="meta")
    for direction, operator, args in (("forward", forward, arguments), ("backward", backward, backward_arguments)):
        outputs = operator(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        read, written = bytes_moved(operator, *args)
        counted, loaded = read + written, bytes_loaded(operator, *args) + written
        least = sum(tensor.nbytes for tensor in (*args, *outputs) if isinstance(tensor, Tensor))
        if direction == "forward" and case.get("queries"):  # of q, only those rows
            least -= arguments[0].nbytes // 3 - outputs[0].nbytes
        register_flop_formulas()
        with FlopCounterMode(display=False) as counter:
            operator(*args)
        gigaflops = counter.get_total_flops() / 1e9
        megabytes = " | ".join(f"{nbytes / 1e6:.1f}" for nbytes in (counted, loaded, least))
        row = f"| {layer} | {direction} | {gigaflops:.2f} | {megabytes} |"
        assert row in README, row


PRODUCTS = {
    "fwd": 2,
    "bwd": 5,
    "blocked_fwd": 2,
    "blocked_bwd_queries": 5,
    "blocked_bwd_keys": 4,
    "blocked_bwd_pairs": 2,
}
PLAIN, PADDED, GENERAL = "plain", "padded", "cosine-padded"  # shifted all three
FORMS = {PLAIN: "shifted", PADDED: "shifted, padded", GENERAL: "shifted, padded, cosine"}
Case = tuple[int, int, torch.dtype, str, int]  # side of the window, channels of a head, dtype, variant, capability
# Instructions that load or store spilled words, and bytes of stack, by kernel; README.md has them. A configuration that
# mends one, or the compiler, makes its test fail.
SPILLS = {
    (8, 32, FP32, PLAIN, 80): {"bwd": (11, 16)},
    (12, 96, BF16, GENERAL, 100): {"blocked_bwd_keys": (0, 8)},
}
# Whose threads have fewer than four values to store: 512 of 64 x 8 gradients, 256 of 16 x 16 sums.
NARROW = {((7, 8, FP32, PADDED, 80), "bwd"), ((12, 96, FP32, GENERAL, 80), "blocked_bwd_pairs")}
IN_MAKE_TEST = {(7, 32, BF16, PLAIN, 90)}
MATRIX = [
    *product((6, 12), (32,), (BF16, FP32), (GENERAL,), offline.CAPABILITIES),
    *product((7,), (32,), (BF16, FP32), (PLAIN,), offline.CAPABILITIES),
    (12, 96, BF16, PLAIN, 90),
    (12, 96, FP32, GENERAL, 80),
    (7, 8, BF16, PLAIN, 90),
    (7, 8, FP32, PADDED, 80),
    (8, 16, FP32, PLAIN, 80),
    (7, 32, FP32, PADDED, 90),
    (8, 32, BF16, GENERAL, 90),
    (16, 48, BF16, GENERAL, 80),
]
OF_THE_TABLE = {6: 2, 7: 2, 12: 1}  # kernels by side of the window; blocks read the table itself


def launches_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, offline.Launch]:
    """Every launch of both directions, by the kernel's short name; those of the biases differ in their grids alone."""
    side, head_size, dtype, variant, capability = case
    monkeypatch.setattr(kernels, "capability_of", lambda device, known: capability)
    grid = 4 * side - (variant != PLAIN)
    arguments, backward_arguments = operator_arguments(
        shape=(64, grid, grid, 4, head_size),
        window_size=(side, side),
        shift=(side // 2, side // 2),
        dtype=dtype,
        parameter_dtype=FP32,
        cosine=variant == GENERAL,
        device="meta",
    )
    made = offline.launches(kernels.forward, *arguments) + offline.launches(kernels.backward, *backward_arguments)
    return {
        launch.kernel.__name__.removeprefix("_window_attention_").removesuffix("_kernel"): launch for launch in made
    }


def frugal_kernels(case: Case) -> list[str]:
    """Kernels over windows that a case launches and that spill nothing."""
    whole = case[0] ** 2 <= 64 and case[1] <= 32
    return [name for name in PRODUCTS if ("blocked" not in name) == whole and name not in SPILLS.get(case, {})]


def label(case: Case) -> str:
    side, head_size, dtype, variant, capability = case
    return f"window{side}-head{head_size}-{str(dtype).removeprefix('torch.')}-{variant}-{capability}"


def compiled_cases() -> Iterator[Any]:
    for case in MATRIX:
        slow = [] if case in IN_MAKE_TEST else [pytest.mark.slow]
        yield pytest.param(case, id=label(case), marks=[pytest.mark.compiles(len(frugal_kernels(case))), *slow])


@pytest.mark.parametrize("case", list(compiled_cases()))
def test_triton_kernels_compile(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, capability = launches_of(case, monkeypatch), case[-1]
    over_windows = {name for name, launch in made.items() if "qkv_ptr" in launch.arguments}
    assert over_windows == {*frugal_kernels(case), *SPILLS.get(case, ())}
    for name in frugal_kernels(case):
        compiled = offline.compile_launch(made[name], capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        offline.assert_products(compiled, case[2], PRODUCTS[name])
        assert compiled.count(r"LDG(STS)?\.E\S*\.128") > 0
        assert compiled.count(r"STG\.E\S*\.128") > 0 or (case, name) in NARROW


def table_cases() -> Iterator[Any]:
    for (side, count), capability in product(OF_THE_TABLE.items(), offline.CAPABILITIES):
        slow = [] if (side, capability) == (7, 90) else [pytest.mark.slow]
        yield pytest.param(side, capability, marks=[pytest.mark.compiles(count), *slow])


@pytest.mark.parametrize(("side", "capability"), list(table_cases()))
def test_triton_kernels_of_the_table_compile(
    side: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = launches_of((side, 32, BF16, PLAIN, capability), monkeypatch)
    of_the_table = [name for name in made if name not in PRODUCTS]
    assert len(of_the_table) == OF_THE_TABLE[side]
    for name in of_the_table:
        offline.assert_frugal(offline.compile_launch(made[name], capability, tmp_path), capability)


def spilling_cases() -> list[Any]:
    return [
        pytest.param(case, name, id=f"{name}-{label(case)}") for case, of_case in SPILLS.items() for name in of_case
    ]


@pytest.mark.slow
@pytest.mark.compiles(1)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="registers are spilled")
@pytest.mark.parametrize(("case", "name"), list(spilling_cases()))
def test_spilling_kernels_compile(case: Case, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = offline.compile_launch(launches_of(case, monkeypatch)[name], case[-1], tmp_path)
    spills = compiled.count("LDL") + compiled.count("STL"), compiled.stack
    if triton.__version__.startswith("3.8.") and spills != SPILLS[case][name]:
        pytest.fail(f"README.md says {SPILLS[case][name]} instructions and bytes of stack, these are {spills}")
    offline.assert_frugal(compiled, case[-1])


@pytest.mark.parametrize(("case", "name"), list(spilling_cases()))
def test_readme_states_the_spills(case: Case, name: str) -> None:
    side, head_size, dtype, variant, capability = case
    instructions, stack = SPILLS[case][name]
    what = f"{name} | {side} x {side} | {head_size} | {SHORT[dtype]} | {FORMS[variant]} | {capability / 10}"
    row = f"| {what} | {instructions} | {stack} |"
    assert row in README, row


def test_readme_states_what_is_compiled() -> None:
    capabilities: dict[tuple, list[str]] = {}
    for *what, capability in MATRIX:
        capabilities.setdefault(tuple(what), []).append(f"{capability / 10}")
    for (side, head_size, dtype, variant), some in capabilities.items():
        row = f"| {side} x {side} | {head_size} | {SHORT[dtype]} | {FORMS[variant]} | {', '.join(some)} |"
        assert row in README, row
