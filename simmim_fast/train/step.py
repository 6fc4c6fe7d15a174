"""One update: forward, backward, clip, optimizer, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simmim_fast.train.stream import MicroBatch

# The loss divides by the number of masked pixels plus this (official models/simmim.py).
LOSS_EPS = 1e-5
# With a fused form; AdamW is an Adam.
FUSED = (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


def train_step(
    model: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    clip_grad: float | None = None,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """One update, equal to that over all micro-batches at once where the model draws nothing at random.

    The model averages over the masked pixels of its micro-batch; weighted by their share of all masked pixels of the
    update, the losses, and so the gradients, add up to those of the one large batch. Stochastic depth and dropout draw
    anew for each micro-batch: with them the two differ by chance.

    A fused optimizer leaves parameters and moments as they are where the loss or the gradient is not finite.

    Args:
        model: Called as `model(images, mask)`; returns the mean over the masked pixels and channels.
        optimizer: Its parameters are updated.
        micro_batches: Pairs of images (B, C, H, W), copied to the mask's device, and masks (B, H / patch, W / patch).
        clip_grad: Largest norm of the whole gradient; None does not clip.
        bf16: Run the model under bfloat16 autocast.

    Returns:
        Loss, and gradient norm before clipping: scalars on the device, which is not waited for.

    Raises:
        TypeError: a float mask: its cells could be neither hidden nor visible.
    """
    for _, mask in micro_batches:
        if mask.is_floating_point():
            raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    optimizer.zero_grad()
    masked_pixels = [_masked_pixels(images, mask) for images, mask in micro_batches]
    all_masked_pixels = sum(masked_pixels)
    losses = []
    for (images, mask), pixels in zip(micro_batches, masked_pixels, strict=True):
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=bf16):
            loss = model(images.to(mask.device, non_blocking=True), mask)
        loss = loss * ((pixels + LOSS_EPS) / (all_masked_pixels + LOSS_EPS)).to(loss.dtype)
        loss.backward()
        losses.append(loss.detach())
    loss, grad_norm = torch.stack(losses).sum(), _clip(optimizer, clip_grad)
    _step_where_finite(optimizer, loss, grad_norm)
    return loss, grad_norm


def is_fused_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's in its fused form, whose kernel can be told on the device to leave all as it is."""
    return isinstance(optimizer, FUSED) and all(group.get("fused") for group in optimizer.param_groups)


def _step_where_finite(optimizer: torch.optim.Optimizer, *scalars: Tensor) -> None:
    """An update by which a fused optimizer changes nothing where one of the scalars is not finite."""
    if not is_fused_optimizer(optimizer):
        optimizer.step()
        return
    _zero_momentum(optimizer)
    optimizer.found_inf = (~torch.stack([scalar.double() for scalar in scalars]).isfinite()).any().float()
    try:
        optimizer.step()  # reads found_inf, as torch.amp.GradScaler hands it over
    finally:
        del optimizer.found_inf


def _zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """SGD takes its first gradient as momentum; had that update been left out, it would go on with unset memory."""
    for group in optimizer.param_groups:
        if group.get("momentum", 0) and not group["dampening"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if parameter.grad is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _masked_pixels(images: Tensor, mask: Tensor) -> Tensor:
    """Number of pixels under the mask, a float64 scalar on the mask's device."""
    pixels_per_cell = images.shape[-2:].numel() // mask.shape[-2:].numel()
    return mask.ne(0).sum().double() * pixels_per_cell


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if largest is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, largest)
