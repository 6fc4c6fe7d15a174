from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simmim_fast import _backends
from simmim_fast._backends import ENVIRONMENT_VARIABLE, Op, choose, refusal

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
FP32 = torch.float32
EVERYWHERE = Op("an_op", {"reference": print, "native": print, "triton": print}, ("cpu", "cuda"))
PLAIN = Op("plain_op", {"reference": print}, ())


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that exactly these backends can run; the others are "broken"."""

    def pretend(*names: str) -> None:
        reasons = {name: None if name in names else "broken" for name in ("native", "triton")}
        refusals = {name: lambda op, device, dtype, reason=reason: reason for name, reason in reasons.items()}
        monkeypatch.setattr(_backends, "_REFUSALS", refusals)

    return pretend


@pytest.mark.parametrize(
    ("device", "names", "expected"),
    [
        (CUDA, ("reference", "native", "triton"), "triton"),
        (CUDA, ("reference", "native"), "native"),
        (CUDA, ("reference",), "reference"),
        (CPU, ("reference", "native", "triton"), "native"),
        (CPU, ("reference", "triton"), "reference"),
        (META, ("reference", "native", "triton"), "reference"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_auto_takes_the_first_that_can_run(
    available: Callable[..., None], device: torch.device, names: tuple[str, ...], expected: str
) -> None:
    available(*names)
    assert choose(EVERYWHERE, "auto", device, FP32) == expected


def test_auto_passes_over_what_does_not_take_the_size(available: Callable[..., None]) -> None:
    available("reference", "native", "triton")
    too_large = {"triton": "it takes 64 tokens"}.get
    assert choose(EVERYWHERE, "auto", CUDA, FP32, too_large) == "native"
    with pytest.raises(RuntimeError, match="an_op: backend='triton' cannot run here: it takes 64 tokens"):
        choose(EVERYWHERE, "triton", CUDA, FP32, too_large)


def test_auto_takes_what_was_measured_to_be_fastest(
    available: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    available("reference", "native", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "FASTEST", {((9, 0), "an_op"): "native", ((8, 0), "an_op"): "reference"})
    assert choose(EVERYWHERE, "auto", CUDA, FP32) == "native"
    assert choose(EVERYWHERE, "auto", CUDA, FP32, {"native": "it takes 64 tokens"}.get) == "triton"
    assert choose(EVERYWHERE, "auto", CPU, FP32) == "native"
    monkeypatch.setattr(_backends, "FASTEST", {((8, 0), "an_op"): "native"})
    assert choose(EVERYWHERE, "auto", CUDA, FP32) == "triton"


def test_auto_takes_the_reference_for_float64_on_a_gpu(
    available: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    available("reference", "native", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "FASTEST", {((9, 0), "an_op"): "native"})
    assert choose(EVERYWHERE, "auto", CUDA, torch.float64) == "reference"
    assert choose(EVERYWHERE, "auto", CPU, torch.float64) == "native"


def test_triton_takes_float64_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it takes no float64 on a GPU, where Triton does not compile products of it"
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
    assert refusal(EVERYWHERE, "triton", CUDA, torch.float64) == reason
    with pytest.raises(RuntimeError, match=f"an_op: backend='triton' cannot run here: {reason}"):
        choose(EVERYWHERE, "triton", CUDA, torch.float64)
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", True)
    for device in (CPU, CUDA):
        assert refusal(EVERYWHERE, "triton", device, torch.float64) is None


def test_auto_passes_over_what_the_op_lacks() -> None:
    assert choose(PLAIN, "auto", CPU, FP32) == "reference"
    with pytest.raises(RuntimeError, match="plain_op has no native implementation"):
        choose(PLAIN, "native", CPU, FP32)


def test_a_name_never_falls_back(available: Callable[..., None]) -> None:
    available("reference", "native")
    assert choose(EVERYWHERE, "reference", CPU, FP32) == "reference"
    with pytest.raises(RuntimeError, match="an_op: backend='triton' cannot run here: broken"):
        choose(EVERYWHERE, "triton", CPU, FP32)


def test_the_variable_is_what_auto_means(available: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    available("reference", "native")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose(EVERYWHERE, "auto", CPU, FP32) == "reference"
    assert choose(EVERYWHERE, "native", CPU, FP32) == "native"
    for unset in ("", "auto"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, unset)
        assert choose(EVERYWHERE, "auto", CPU, FP32) == "native"


def test_the_variable_never_falls_back(available: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    available("reference")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    with pytest.raises(RuntimeError, match="an_op: SIMMIM_FAST_BACKEND='native' cannot run here: broken"):
        choose(EVERYWHERE, "auto", CPU, FP32)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "referenec")
    with pytest.raises(ValueError, match=r"SIMMIM_FAST_BACKEND must be one of .* \(did you mean 'reference'\?\)"):
        choose(EVERYWHERE, "auto", CPU, FP32)


@pytest.mark.parametrize(("wish", "nearest"), [("tritn", "triton"), ("Native", "native"), ("automatic", "auto")])
def test_an_unknown_name_is_answered_with_the_nearest(wish: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"backend must be one of .*; got '{wish}' .did you mean '{nearest}'"):
        choose(EVERYWHERE, wish, CPU, FP32)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "reason"),
    [
        ("native", META, FP32, "it takes CPU and CUDA tensors, not meta"),
        ("native", CPU, torch.complex64, "it has no kernel for torch.complex64"),
        ("triton", META, FP32, "it takes CUDA tensors, not meta"),
        ("triton", CPU, FP32, "it takes CPU tensors only where TRITON_INTERPRET=1 was set before the import"),
        ("reference", META, torch.complex64, None),
    ],
)
def test_reasons(backend: str, device: torch.device, dtype: torch.dtype, reason: str | None) -> None:
    assert refusal(EVERYWHERE, backend, device, dtype) == reason


def test_reason_of_a_library_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends._native, "why_not", lambda device: f"not compiled for {device}")
    assert refusal(EVERYWHERE, "native", CPU, FP32) == "not compiled for cpu"


def test_reason_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_HAS_TRITON", False)
    assert refusal(EVERYWHERE, "triton", CUDA, FP32) == "the package triton is not installed"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.5.1", "it needs triton 3.6 or newer; got 3.5.1"),
        ("2.10.0", "it needs triton 3.6 or newer; got 2.10.0"),
        ("3.6.0+git1234", None),
        ("3.10.0", None),
        ("4.0.0", None),
        (None, None),
    ],
)
def test_reason_of_an_old_triton(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_TRITON_VERSION", version)
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", True)
    assert refusal(EVERYWHERE, "triton", CPU, FP32) == reason


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.7.1", (10, 0), "it needs triton 3.8 or newer on compute capability (10, 0), which cuda has; got 3.7.1"),
        ("3.6.0", (10, 3), "it needs triton 3.8 or newer on compute capability (10, 3), which cuda has; got 3.6.0"),
        ("3.8.0", (10, 0), None),
        ("3.6.0", (9, 0), None),
        ("3.6.0", (12, 0), None),
    ],
)
def test_reason_of_a_triton_that_multiplies_in_tf32(
    version: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backends, "_TRITON_VERSION", version)
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backends, "_capability", lambda device: capability)
    assert refusal(EVERYWHERE, "triton", CUDA, FP32) == reason


def test_reasons_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(EVERYWHERE, "triton", CUDA, FP32) == "PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, reason in ((7, "it needs compute capability (8, 0), cuda has (7, 5)"), (9, None)):
        properties = type("Properties", (), {"major": major, "minor": 5})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert refusal(EVERYWHERE, "triton", CUDA, FP32) == reason


def test_native_is_off_where_an_op_has_no_kernel_for_the_device() -> None:
    on_the_cpu = Op("cpu_op", {"reference": print, "native": print}, ("cpu",))
    assert refusal(on_the_cpu, "native", CPU, FP32) is None
    assert refusal(on_the_cpu, "native", CUDA, FP32) == "there is no CUDA C++ for this op"


def test_transforms_of_torch_func_and_forward_mode_take_the_reference() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        assert choose(EVERYWHERE, "auto", CPU, FP32) == "reference"
        assert "no torch.func transform, no forward mode" in refusal(EVERYWHERE, "native", CPU, FP32)
        return x.sum()

    x = torch.ones(2, 3)
    torch.func.vmap(chosen)(x)
    torch.func.grad(chosen)(x)
    torch.func.jvp(chosen, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        chosen(x)
    assert refusal(EVERYWHERE, "native", CPU, FP32) is None
