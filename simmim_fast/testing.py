"""Inputs and error budgets, shared by tests and benchmarks.

Two rules decide whether a result is right. Copies and selections must equal the reference bit for bit
(`assert_equal`). Everything else is compared with float64, in relative L2 over the tensor: it may err at most twice
(outputs) or three times (gradients) what the reference errs in the same dtype, plus 4 eps; in float64, 1e-12
(`assert_within_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOAT64_BUDGET = 1e-12
GUARD_BYTES = 256  # on either side of a guarded buffer; keeps its alignment
GUARD_BYTE = 0xA5


def substitute_mask_tokens_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    pos_embed: bool = True,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Arguments of `ops.substitute_mask_tokens` by name.

    Args:
        shape: (B, H, W, C) of x.
        dtype: Of x.
        parameter_dtype: Of the mask token and the positions; x's by default.
        pos_embed: With positions or with None.
        hidden: Share of the tokens that the mask hides; 0 and 1 are exact.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    return {
        "x": random_tensor(shape, dtype, generator).to(device),
        "mask": (torch.rand(shape[:3], generator=generator) < hidden).to(device),
        "mask_token": random_tensor(shape[3:], parameter_dtype, generator).to(device),
        "pos_embed": random_tensor(shape[1:], parameter_dtype, generator).to(device) if pos_embed else None,
    }


def biased_attention_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
    queries: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.biased_attention` by name.

    Args:
        shape: (B, N, heads, D).
        dtype: Of qkv.
        bias_dtype: Of the bias; qkv's by default.
        bias: With a bias or with None.
        queries: Distinct tokens of each image whose outputs are wanted, in random order; None for all.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, tokens, heads, head_size = shape
    arguments = {
        "qkv": random_tensor((images, tokens, 3 * heads * head_size), dtype, generator).to(device),
        "bias": random_tensor((heads, tokens, tokens), bias_dtype or dtype, generator).to(device) if bias else None,
        "num_heads": heads,
    }
    if queries is not None:
        order = torch.rand((images, tokens), generator=generator).argsort(dim=1)
        arguments["queries"] = order[:, :queries].int().to(device)
    return arguments


def shifted_window_attention_inputs(
    shape: tuple[int, int, int, int, int],
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    cosine: bool = False,
    pad_value: bool = True,
    queries: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.shifted_window_attention` by name.

    Args:
        shape: (B, H, W, heads, D).
        window_size: Height and width of a window.
        shift: Rows and columns of the roll.
        dtype: Of qkv.
        parameter_dtype: Of table, logit scale and padding value; qkv's by default.
        cosine: With a logit scale or with None.
        pad_value: With a padding value, where the window does not divide the grid, or with None.
        queries: Distinct tokens of each image whose outputs are wanted, in random order; None for all.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    images, height, width, heads, head_size = shape
    pad_value = pad_value and (height % window_size[0] != 0 or width % window_size[1] != 0)
    channels = 3 * heads * head_size
    offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
    logit_scale = 2 + random_tensor((heads,), parameter_dtype, generator)
    return {
        "qkv": random_tensor((images, height, width, channels), dtype, generator).to(device),
        "bias_table": random_tensor((offsets, heads), parameter_dtype, generator).to(device),
        "window_size": window_size,
        "shift": shift,
        "num_heads": heads,
        "logit_scale": logit_scale.to(device) if cosine else None,
        "pad_value": random_tensor((channels,), parameter_dtype, generator).to(device) if pad_value else None,
        "queries": None if queries is None else order[:, :queries].int().to(device),
    }


def masked_patch_embed_inputs(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    image_dtype: torch.dtype | None = None,
    norm: bool = True,
    pos_embed: bool = True,
    visible: bool = False,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.masked_patch_embed` by name.

    Args:
        shape: (B, H / p, W / p, channels of the image, p, C).
        dtype: Of the weight.
        parameter_dtype: Of bias, norm, mask token and positions; the weight's by default.
        image_dtype: The weight's by default; uint8 comes with mean and std.
        norm: With a norm or without.
        pos_embed: With positions or with None.
        visible: With the list of visible patches, in random order, or with None.
        hidden: Share of the patches of each image that the mask hides, the same number in every image.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, height, width, planes, patch, channels = shape
    parameter_dtype, image_dtype = parameter_dtype or dtype, image_dtype or dtype

    def parameter(*size: int) -> Tensor:
        return random_tensor(size, parameter_dtype, generator).to(device)

    pixels = (images, planes, height * patch, width * patch)
    is_bytes = image_dtype == torch.uint8
    image = (
        torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8)
        if is_bytes
        else random_tensor(pixels, image_dtype, generator)
    )
    order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
    shown = order[:, round(hidden * height * width) :]
    mask = torch.ones((images, height * width), dtype=torch.bool).scatter_(1, shown, False)
    weight = random_tensor((channels, planes, patch, patch), torch.float32, generator) / (planes**0.5 * patch)
    return {
        "image": image.to(device),
        "mask": mask.view(images, height, width).to(device),
        "weight": weight.to(device, dtype),
        "bias": parameter(channels),
        "norm_weight": parameter(channels) if norm else None,
        "norm_bias": parameter(channels) if norm else None,
        "mask_token": parameter(channels),
        "pos_embed": parameter(height, width, channels) if pos_embed else None,
        "mean": torch.rand(planes, generator=generator).to(device) if is_bytes else None,
        "std": (torch.rand(planes, generator=generator) + 0.5).to(device) if is_bytes else None,
        "visible": shown.int().to(device) if visible else None,
    }


def masked_l1_loss_inputs(
    shape: tuple[int, int, int, int],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    *,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.masked_l1_loss` by name. Residuals stay away from 0, where the gradient jumps.

    Args:
        shape: (B, channels, H, W).
        patch_size: Pixels along the side of a mask entry; divides H and W.
        dtype: Of the prediction.
        target_dtype: The prediction's by default; uint8 comes with mean and std.
        hidden: Share of the mask's entries that are set; 0 and 1 are exact.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = random_tensor(shape, dtype, generator) / 2
    arguments = {"prediction": prediction, "patch_size": patch_size}
    arguments |= _pixels(prediction.double(), patch_size, target_dtype or dtype, hidden, generator)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def linear_masked_loss_inputs(
    shape: tuple[int, int, int, int, int, int],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    *,
    tokens: bool = False,
    loss: str = "l1",
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.linear_masked_loss` by name. Residuals stay away from 0, where the gradient of L1 jumps.

    Args:
        shape: (B, h, w, D, stride, channels).
        patch_size: Pixels along the side of a mask entry; divides h and w times the stride.
        dtype: Of features, weight and bias.
        target_dtype: Theirs by default; uint8 comes with mean and std.
        tokens: With the list of masked tokens, or with None. The mask then hides whole tokens, as many in each image.
        loss: Its name.
        hidden: Share of the mask's entries, or of the tokens, that is hidden.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, height, width, depth, stride, channels = shape
    weight = random_tensor((stride**2 * channels, depth), torch.float32, generator) / (2 * max(depth, 1) ** 0.5)
    features = random_tensor((images, height, width, depth), dtype, generator)
    bias = random_tensor((stride**2 * channels,), torch.float32, generator) / 4
    arguments = {"features": features, "weight": weight.to(dtype), "bias": bias.to(dtype), "patch_size": patch_size}
    prediction = features.double() @ weight.to(dtype).double().T + bias.to(dtype).double()
    prediction = prediction.view(images, height, width, channels, stride, stride).permute(0, 3, 1, 4, 2, 5)
    prediction = prediction.reshape(images, channels, height * stride, width * stride)
    arguments |= {"loss": loss} | _pixels(prediction, patch_size, target_dtype or dtype, hidden, generator)
    if tokens:
        order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
        listed = order[:, : round(hidden * height * width)].sort(dim=1).values
        masked = torch.zeros((images, height * width), dtype=torch.bool).scatter_(1, listed, True)
        whole = masked.view(images, height, 1, width, 1).expand(-1, -1, stride, -1, stride)
        whole = whole.reshape(images, height * stride, width * stride)
        arguments |= {"tokens": listed.int(), "mask": whole[:, ::patch_size, ::patch_size]}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _pixels(
    prediction: Tensor, patch_size: int, dtype: torch.dtype, hidden: float, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Target, mask, mean and std for a prediction (B, channels, H, W), from which the target differs by 0.5 to 1.5."""
    images, channels, height, width = prediction.shape
    sign = torch.randint(0, 2, prediction.shape, generator=generator) * 2 - 1
    target = prediction + sign * (0.5 + torch.rand(prediction.shape, generator=generator))
    mask = torch.rand((images, height // patch_size, width // patch_size), generator=generator) < hidden
    if dtype != torch.uint8:
        return {"target": target.to(dtype), "mask": mask, "mean": None, "std": None}
    mean = torch.rand(channels, generator=generator) / 10 + 0.45
    std = torch.rand(channels, generator=generator) / 50 + 0.1
    target = ((target * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255).to(torch.uint8)
    return {"target": target, "mask": mask, "mean": mean, "std": std}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal values, drawn in float32 for every dtype."""
    return torch.randn(shape, generator=generator).to(dtype)


def permuted(tensor: Tensor) -> Tensor:
    """The same values with the last axis outermost in memory, as a convolution leaves its channels."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def run(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    grad_out: Tensor | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Call a function and, with the gradient of its output, differentiate it.

    Args:
        function: Takes the inputs by name and returns one tensor.
        inputs: Arguments by name.
        grad_out: Gradient of the output, or None for the output alone.
        wanted: Inputs that get a gradient; by default every floating tensor.

    Returns:
        "out", and "grad_<name>" for each wanted input.
    """
    if wanted is None:
        wanted = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if grad_out is None:
        return {"out": function(**inputs).detach()}
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    out = function(**{**inputs, **leaves})
    gradients = torch.autograd.grad(out, tuple(leaves.values()), grad_out)
    return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def random_gradient(reference: Callable[..., Tensor], inputs: Mapping[str, Any], seed: int = 1) -> Tensor:
    """A random gradient for the output that the reference has for these inputs, with its dtype and strides."""
    out = reference(**inputs)
    return torch.empty_like(out).copy_(random_tensor(out.shape, out.dtype, torch.Generator().manual_seed(seed)))


def assert_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """Output and gradients of a function are right, and it stays inside its buffers and writes all of them.

    Args:
        function: What is tested; takes the inputs by name and returns one tensor.
        reference: The oracle, with the same arguments.
        inputs: Arguments by name.
        copies: Results ("out", "grad_<name>") that must equal the reference's bit for bit.
        wanted: Inputs that get a gradient; by default every floating tensor.
    """
    grad_out = random_gradient(reference, inputs)
    with Guards() as guards:
        guarded_inputs = {name: guards.place(value) for name, value in inputs.items()}
        actual = run(function, guarded_inputs, guards.place(grad_out), wanted)
    guards.check()
    assert_right(actual, reference, inputs, grad_out, copies=copies, wanted=wanted)


def assert_right(
    actual: Mapping[str, Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    grad_out: Tensor,
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """What `run` gave for these inputs and gradient is right by the two rules; arguments as in `assert_matches`."""
    plain = run(reference, inputs, grad_out, wanted)
    exact = run(reference, {name: _to_float64(value) for name, value in inputs.items()}, grad_out.double(), wanted)
    for name in plain:
        if name in copies:
            assert_equal(actual[name], plain[name], name)
        else:
            factor = OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR
            assert_within_budget(actual[name], plain[name], exact[name], factor, name)


def assert_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    """Same dtype, shape and values, NaN being equal to NaN."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False, msg=lambda message: f"{name}: {message}"
    )


def assert_within_budget(actual: Tensor, reference: Tensor, exact: Tensor, factor: float, name: str) -> None:
    """Against float64, `actual` errs at most `factor` times what the same-dtype reference errs, plus 4 eps."""
    assert (actual.dtype, actual.shape) == (reference.dtype, reference.shape), (
        f"{name}: {actual.dtype} {tuple(actual.shape)}; the reference has {reference.dtype} {tuple(reference.shape)}"
    )
    if actual.dtype == torch.float64:
        budget = FLOAT64_BUDGET
    else:
        budget = factor * relative_error(reference, exact) + 4 * torch.finfo(actual.dtype).eps
    error = relative_error(actual, exact)
    assert error <= budget, f"{name}: relative L2 error {error:.3g}, budget {budget:.3g}"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 error over the whole tensor; absolute where `exact` is all zero."""
    norm = exact.double().norm().item()
    error = (actual.double() - exact.double()).norm().item()
    return error / norm if norm > 0 else error


def assert_repeats(call: Callable[[], Mapping[str, Tensor]], times: int) -> None:
    """The results of a call are the same, bit for bit, each time."""
    first = call()
    for _ in range(times - 1):
        for name, result in call().items():
            assert_equal(result, first[name], name)


def assert_ignores_threads(call: Callable[[], Mapping[str, Tensor]]) -> None:
    """The results of a call are the same, bit for bit, on one thread and on two."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = call()
        torch.set_num_threads(2)
        for name, result in call().items():
            assert_equal(result, single[name], name)
    finally:
        torch.set_num_threads(before)


class Guards(TorchDispatchMode):
    """Puts guard bytes around buffers: those that `place` copies, and those that this library's operators allocate.

    Allocations start out as all ones, which is NaN in every floating dtype, so that what is not written shows. They are
    seen as far as they go through PyTorch's dispatcher, from Python and from C++.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._operators: dict[str, int] = {}  # operator -> allocations seen

    def place(self, value: Any) -> Any:
        """A copy of a tensor between guards; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        return self._allocate(value.shape, value.stride(), value.dtype, value.device).copy_(value)

    def check(self) -> None:
        """No guard has changed, and every operator's allocations were seen."""
        for operator, allocations in self._operators.items():
            assert allocations > 0, f"{operator} allocates where guards cannot see it"
        for buffer in self._buffers:
            for side, guard in (("before", buffer[:GUARD_BYTES]), ("behind", buffer[-GUARD_BYTES:])):
                assert bool((guard == GUARD_BYTE).all()), f"written {side} a buffer of {buffer.numel()} bytes"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "simmim_fast":
            before = len(self._buffers)
            with self:  # again, for what the kernel calls
                result = func.redispatch(backend_keys(args), *args)
            self._operators[str(func)] = len(self._buffers) - before
            return result
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            return self._allocate(result.shape, result.stride(), result.dtype, result.device)
        return result

    def _allocate(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        buffer = torch.full(
            (elements * dtype.itemsize + 2 * GUARD_BYTES,), GUARD_BYTE, dtype=torch.uint8, device=device
        )
        self._buffers.append(buffer)
        return buffer[GUARD_BYTES:-GUARD_BYTES].fill_(0xFF).view(dtype).as_strided(shape, stride)


_ALLOCATIONS = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)


def backend_keys(args: tuple) -> torch._C.DispatchKeySet:
    """Where a kernel is looked for, from the device of the first tensor: a redispatch there skips autograd."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))


def _to_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
