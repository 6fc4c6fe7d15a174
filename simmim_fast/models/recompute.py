"""Linear layers that compute what they read again in the backward instead of storing it.

The weight gradient of a linear layer needs the layer's input. Behind a LayerNorm or a GELU that is large, and cheap to
have again from what is stored anyway: the residual stream and the norm's statistics, or the hidden layer before the
GELU. So the backward takes the gradient of the input first; then the backward of the norm or the GELU, whose one pass
yields the input again; and then the weight gradient. Under autocast a weight's copy in the dtype of the products is
made again, too, where that is asked for.

Shapes: x, delta and the stream (B, ..., C); weight (D, C) and bias (D) of a linear layer, its product (B, ..., D);
gamma, delta_bias and a norm's weight and bias (C); keep (B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simmim_fast._backends import choose
from simmim_fast.ops.bias_gelu.op import OP as BIAS_GELU
from simmim_fast.ops.residual_layer_norm.op import OP as RESIDUAL_LAYER_NORM
from simmim_fast.ops.residual_layer_norm.op import size_refusal
from simmim_fast.ops.residual_layer_norm.reference import norm_dtype, stream_dtype

RECOMPUTE = ("none", "pointwise", "mlp")


class Affine(NamedTuple):
    """The parameters of a linear layer, in the dtype of its product.

    Attributes:
        weight: (D, C).
        bias: (D), or None.
        stored: What the backward keeps in the weight's stead and casts again, or None to keep the weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    stored: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """x (..., C) to (..., D)."""
        return F.linear(x, self.weight, self.bias)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches what goes into the module, or comes out of it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(len, hooks))


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module's parameters may stand for it: it is PyTorch's own, unsharded and without hooks."""
    return type(module) is kind and not has_hooks(module) and not is_traceable_wrapper_subclass(module.weight)


def is_plain_norm(norm: nn.Module) -> bool:
    """The same of a LayerNorm, which must have both parameters."""
    return is_plain(norm, nn.LayerNorm) and norm.bias is not None


def norm_backend(x: Tensor, delta: Tensor | None, backend: str) -> str | None:
    """Of the backends of residual_layer_norm the one that computes again, or None for the reference, which does not."""
    refusal = partial(size_refusal, channels=x.shape[-1])
    chosen = choose(RESIDUAL_LAYER_NORM, backend, x.device, stream_dtype(x, delta), refusal)
    return None if chosen == "reference" else chosen


def gelu_backend(weight: Tensor, backend: str) -> str | None:
    """The same of bias_gelu, for products with a weight."""
    chosen = choose(BIAS_GELU, backend, weight.device, weight.dtype)
    return None if chosen == "reference" else chosen


def cast_together(tensors: Sequence[Tensor], outgoing: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors as autocast casts the operands of a product, and copies of others, by one operator in each direction.

    Args:
        tensors: They themselves come back where autocast would leave them as they are.
        outgoing: What leaves the module that they are parameters of, where sharding may free them: copied as they are.
    """
    device_type = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    dtypes = [tensor.dtype if autocast is None or tensor.dtype == torch.float64 else autocast for tensor in tensors]
    copied = [(tensor, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True) if tensor.dtype != dtype]
    copied += [(tensor, tensor.dtype) for tensor in outgoing]
    originals, new_dtypes = zip(*copied, strict=True) if copied else ((), ())
    copies = iter(_CastTogether.apply(new_dtypes, *originals) if copied else ())
    cast = [tensor if tensor.dtype == dtype else next(copies) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    return cast, list(copies)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = _copies(tensors, dtypes)
        ctx.mark_non_differentiable(*(c for c, t in zip(copies, tensors, strict=True) if not t.requires_grad))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(grad, dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True) if grad is not None]
        cast = iter(_copies(*zip(*given, strict=True)) if given else ())
        return None, *(None if grad is None else next(cast) for grad in gradients)


def _copies(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class NormLinear(torch.autograd.Function):
    """(y, linear(LN(y))) with y = x + keep gamma (delta + delta_bias). Keeps y or, without `store_sum`, x and delta."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        gamma: Tensor | None,
        keep: Tensor | None,
        delta_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        eps: float,
        backend: str,
        store_sum: bool,
    ) -> tuple[Tensor, Tensor]:
        stream = (x, delta, gamma, keep, delta_bias, norm_weight, norm_bias)
        y, normed, norm, statistics = _normed(ctx, *stream, eps, backend, store_sum)
        ctx.save_for_backward(*norm, *statistics, _or(stored, weight))
        return y, F.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        grad_out = _or_zeros(grad_out, grad_y, weight, ctx.norm_dtype)
        needed, grad_normed = ctx.needs_input_grad[7:9], grad_out @ weight.to(grad_out.dtype)
        gradients, normed = _norm_gradients(
            ctx.backend, ctx.dtypes, grad_normed, grad_y, kept, ctx.adds_delta, needed[0]
        )
        return *gradients, *_linear_gradients(grad_out, normed, needed), *[None] * 4


class GeluLinear(torch.autograd.Function):
    """linear(GELU(hidden + hidden_bias)), hidden (..., C) being the product of the layer before."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.backend = backend
        ctx.dtypes = _dtypes_if((hidden, hidden_bias), ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, hidden_bias, _or(stored, weight))
        return F.linear(_operator("bias_gelu", backend)(hidden, hidden_bias), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:4]
        return *_gelu_gradients(ctx.backend, ctx.dtypes, grad_out, *ctx.saved_tensors, needed), None, None


class LinearGeluLinear(torch.autograd.Function):
    """An MLP of x (..., C), whose hidden layer is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hidden_weight: Tensor,
        stored_hidden: Tensor | None,
        hidden_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.backend = backend
        ctx.bias_dtype = hidden_bias.dtype if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(x, _or(stored_hidden, hidden_weight), hidden_bias, _or(stored, weight))
        activated = _operator("bias_gelu", backend)(F.linear(x, hidden_weight), hidden_bias)
        return F.linear(activated, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        return *_mlp_gradients(ctx.backend, ctx.bias_dtype, grad_out, x, *parameters, needed), None, None


class NormMlp(torch.autograd.Function):
    """(y, MLP(LN(y))) with y = x + keep gamma (delta + delta_bias). Stores y; norm and hidden layer come again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        gamma: Tensor | None,
        keep: Tensor | None,
        delta_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        hidden_weight: Tensor,
        stored_hidden: Tensor | None,
        hidden_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        eps: float,
        backend: str,
        gelu_backend: str,
        store_sum: bool,
    ) -> tuple[Tensor, Tensor]:
        stream = (x, delta, gamma, keep, delta_bias, norm_weight, norm_bias)
        y, normed, norm, _ = _normed(ctx, *stream, eps, backend, store_sum)
        ctx.eps, ctx.gelu_backend = eps, gelu_backend
        ctx.bias_dtype = hidden_bias.dtype if ctx.needs_input_grad[9] else None
        ctx.save_for_backward(*norm, _or(stored_hidden, hidden_weight), hidden_bias, _or(stored, weight))
        activated = _operator("bias_gelu", gelu_backend)(F.linear(normed, hidden_weight), hidden_bias)
        return y, F.linear(activated, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        source, delta, norm_weight, norm_bias, gamma, keep, delta_bias, *parameters = ctx.saved_tensors
        grad_out = _or_zeros(grad_out, grad_y, parameters[-1], ctx.norm_dtype)
        branch = (delta, norm_weight, norm_bias, gamma, keep, delta_bias)
        plain = branch if ctx.adds_delta else (None, norm_weight, norm_bias, None, None, None)
        _, normed, *statistics = _normalise(source, *plain, ctx.eps, ctx.backend, ctx.norm_dtype)
        needed = ctx.needs_input_grad[7:12]
        grad_normed, *rest = _mlp_gradients(ctx.gelu_backend, ctx.bias_dtype, grad_out, normed, *parameters, needed)
        kept = (source, *branch, *statistics)
        before, _ = _norm_gradients(ctx.backend, ctx.dtypes, grad_normed, grad_y, kept, ctx.adds_delta, False)
        return *before, *rest, *[None] * 5


_NORM = (0, 1, 5, 6, 2, 4)  # the arguments whose gradients a norm's backward gives, in its order


def _operator(op: str, backend: str, direction: str = "") -> Callable[..., Any]:
    return getattr(torch.ops.simmim_fast, f"{op}_{backend}{direction}").default


def _or(stored: Tensor | None, weight: Tensor) -> Tensor:
    return weight if stored is None else stored


def _dtypes_if(
    tensors: Sequence[Tensor | None], needed: Sequence[bool], indices: Sequence[int] | None = None
) -> tuple[torch.dtype | None, ...]:
    """Of each tensor that needs a gradient its dtype; `indices` say where `needed` has them."""
    indices = range(len(tensors)) if indices is None else indices
    return tuple(t.dtype if needed[i] else None for t, i in zip(tensors, indices, strict=True))


def _or_zeros(grad_out: Tensor | None, grad_y: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a product (B, ..., D) that nobody may have used; y then was, (B, ..., C)."""
    return grad_y.new_zeros((*grad_y.shape[:-1], len(weight)), dtype=dtype) if grad_out is None else grad_out


def _normed(
    ctx: Any,
    x: Tensor,
    delta: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
    store_sum: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], list[Tensor]]:
    """y, LN(y), what the backward has the norm from, and its statistics; the rest of what it asks goes into `ctx`."""
    ctx.backend, ctx.norm_dtype = backend, norm_dtype(x, delta)
    y, normed, *statistics = _normalise(x, delta, weight, bias, gamma, keep, delta_bias, eps, backend, ctx.norm_dtype)
    y = x.view_as(x) if delta is None else y
    ctx.set_materialize_grads(False)  # of y, where nobody uses it
    ctx.adds_delta = delta is not None and not store_sum
    ctx.dtypes = _dtypes_if((x, delta, weight, bias, gamma, delta_bias), ctx.needs_input_grad, _NORM)
    source, added = (x, delta) if ctx.adds_delta else (y, delta if ctx.needs_input_grad[2] else None)
    return y, normed, (source, added, weight, bias, gamma, keep, delta_bias), statistics


def _normalise(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    eps: float,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, and mean and 1 / deviation of each row."""
    operator = _operator("residual_layer_norm", backend)
    return operator(x, delta, weight, bias, gamma, keep, delta_bias, eps, False, dtype)


def _norm_gradients(
    backend: str,
    dtypes: Sequence[torch.dtype | None],
    grad_normed: Tensor,
    grad_y: Tensor | None,
    kept: Sequence[Tensor | None],
    adds_delta: bool,
    recompute: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Gradients of x, delta, gamma, keep (None), delta_bias, weight and bias; the norm's output again, if asked for."""
    source, delta, weight, bias, gamma, keep, delta_bias, mean, rstd = kept
    shared = gamma is None and keep is None and dtypes[0] == dtypes[1]  # x and delta get one tensor, as in a sum
    asked = (dtypes[0], None, *dtypes[2:]) if shared else dtypes
    parameters = (weight, bias if recompute else None, gamma, keep, delta_bias)
    arguments = (grad_normed, grad_y, source, delta, *parameters, mean, rstd, False, adds_delta)
    *gradients, normed = _operator("residual_layer_norm", backend, "_backward")(*arguments, *asked)
    grad_x, grad_delta, grad_weight, grad_bias, grad_gamma, grad_delta_bias = _wanted(gradients, asked)
    before = (grad_x, grad_x if shared else grad_delta, grad_gamma, None, grad_delta_bias)
    return (*before, grad_weight, grad_bias), normed


def _gelu_gradients(
    backend: str,
    dtypes: Sequence[torch.dtype | None],
    grad_out: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, hidden_bias, weight and bias; `needed` is of the last two."""
    backward = _operator("bias_gelu", backend, "_backward")
    *gradients, activated = backward(grad_out @ weight.to(grad_out.dtype), hidden, hidden_bias, needed[0], *dtypes)
    return *_wanted(gradients, dtypes), *_linear_gradients(grad_out, activated, needed)


def _mlp_gradients(
    backend: str,
    bias_dtype: torch.dtype | None,
    grad_out: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, hidden_weight, what is stored of it (None), hidden_bias, weight and bias.

    `needed` is of all but the first.
    """
    hidden_weight = hidden_weight.to(grad_out.dtype)
    hidden = F.linear(x, hidden_weight)
    dtypes = (hidden.dtype, bias_dtype)
    grad_hidden, *rest = _gelu_gradients(backend, dtypes, grad_out, hidden, hidden_bias, weight, needed[3:])
    return grad_hidden @ hidden_weight, _linear_gradients(grad_hidden, x, (needed[0], False))[0], None, *rest


def _linear_gradients(grad_out: Tensor, x: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias."""
    grad_out = grad_out.flatten(0, -2)
    return (grad_out.t() @ x.flatten(0, -2) if needed[0] else None), (grad_out.sum(0) if needed[1] else None)


def _wanted(gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    return [None if dtype is None else gradient for gradient, dtype in zip(gradients, dtypes, strict=True)]
