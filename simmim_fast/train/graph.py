"""The whole update as one CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from simmim_fast._arguments import check_at_least, check_types
from simmim_fast.train.step import is_fused_optimizer, train_step
from simmim_fast.train.stream import MicroBatch

PRECISIONS = ("bf16", "fp32")
Update = Callable[[list[MicroBatch]], tuple[Tensor, Tensor]]
Layout = list[tuple[torch.Size, torch.dtype]]


class GraphedStep:
    """Forward, backward, clipping and a fused optimizer, replayed as one CUDA graph: the host launches one thing.

        step = GraphedStep(model, optimizer, clip_grad=5.0)
        for images, mask in loader:
            loss, grad_norm = step(images, mask)

    Each call is one update. The first calls run eagerly, since a recording needs the optimizer's moments, and so they
    are training too, not a rehearsal; then the update is recorded once and replayed from there on. Where there is no
    CUDA every call is eager, by the same `train_step`, with the same results. An update whose loss or gradient is not
    finite is left out on the device: parameters and moments stay, and the numbers returned tell.

    A recording replays the same work on the same memory. So every call needs the shapes and dtypes of the first; rates
    may change at any time, by a scheduler or by hand: each replay reads every group's "lr", a number or a tensor, which
    stays what it is. Weight decay, betas, `model.train()` and which parameters are trained are those of the recording.
    Python does not run in a replay, and so neither do hooks of modules, tensors or of `optimizer.step`. After
    `optimizer.load_state_dict` it records anew.

    What waits for the device cannot be recorded, nor what reads the random generator's state, as activation
    checkpointing does unless it is told `preserve_rng_state=False`; our models are, where no dropout is on. What
    DistributedDataParallel and torch.compile ask for stands in docs/pretrain.md.

    Args:
        model: Called as `model(images, mask)`; returns the mean over the masked pixels and channels, on one device.
        optimizer: Adam, AdamW, SGD or Adagrad of torch, built with `fused=True`.
        clip_grad: Largest norm of the whole gradient; None does not clip.
        precision: "bf16" runs the model under bfloat16 autocast, "fp32" does not.
        eager_calls: Calls before the recording, at least 1.

    Raises:
        TypeError: `optimizer` is none, `model` cannot be called; an option of another type.
        ValueError: an optimizer that is not fused, SGD with dampening, no parameters or on several devices; on CUDA a
            model of ours that checkpoints activations with dropout; an option out of range.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad: float | None = None,
        precision: Literal["bf16", "fp32"] = "bf16",
        eager_calls: int = 3,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(images, mask), got {type(model).__name__}")
        _check_optimizer(optimizer)
        options = {"clip_grad": clip_grad, "precision": precision, "eager_calls": eager_calls}
        check_types(GraphedStep.__init__, options)
        check_at_least("eager_calls", eager_calls, 1)
        if clip_grad is not None and not clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, or None for no clipping, got {clip_grad}")
        self.optimizer = optimizer
        self.eager_calls = eager_calls
        self.device = _device_of(optimizer)
        if self._is_recorded():
            _check_recomputation(model)
        self._update = partial(train_step, model, optimizer, clip_grad=clip_grad, bf16=precision == "bf16")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._layout: Layout | None = None
        self._forget()
        forget = weakref.WeakMethod(self._forget)  # or the optimizer would keep the recording alive
        hook = optimizer.register_load_state_dict_post_hook(lambda _: forget()())
        weakref.finalize(self, hook.remove)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One update.

        Args:
            *inputs: images (B, C, H, W) and mask (B, H / patch, W / patch), on the device or not; with gradient
                accumulation those of every micro-batch in turn: images, mask, images, mask, ...

        Returns:
            Loss, and gradient norm before clipping: scalars on the device, which is not waited for.

        Raises:
            TypeError: what is no tensor; a mask that is neither bool nor integer.
            ValueError: no pairs, or other shapes or dtypes than in the first call.
        """
        layout = self._check(inputs)
        if not self._is_recorded():
            outputs = self._update(_pairs([tensor.to(self.device) for tensor in inputs]))
        elif self._calls < self.eager_calls:
            with _beside(self._stream):
                outputs = self._update(_pairs([tensor.to(self.device, non_blocking=True) for tensor in inputs]))
        else:
            if self._recording is None:
                self._recording = Recording(self._update, self.optimizer, inputs, self._stream)
            outputs = self._recording.replay(inputs)
        self._calls += 1
        self._layout = layout
        return outputs

    def _is_recorded(self) -> bool:
        return self.device.type == "cuda"

    def _forget(self) -> None:
        self._calls = 0
        self._recording: Recording | None = None

    def _check(self, inputs: tuple[Tensor, ...]) -> Layout:
        if not inputs or len(inputs) % 2:
            raise ValueError(f"inputs must be pairs of images and mask, got {len(inputs)} tensors")
        for one in inputs:
            if not isinstance(one, Tensor):
                raise TypeError(f"inputs must be tensors, got {type(one).__name__}")
        layout = [(tensor.shape, tensor.dtype) for tensor in inputs]
        if self._layout not in (None, layout):
            raise ValueError(f"inputs must be as in the first call, {_text(self._layout)}, got {_text(layout)}")
        return layout


class Recording:
    """An update on memory of its own, recorded without being run.

    Args:
        update: Makes the update of a list of micro-batches.
        optimizer: Whose rates are read anew for every replay; its settings are changed only while this records.
        inputs: Images and mask of every micro-batch in turn; only shapes and dtypes count.
        stream: That records, on the parameters' device.

    Raises:
        Exception: What the update raises where it cannot be recorded.
    """

    def __init__(
        self,
        update: Update,
        optimizer: torch.optim.Optimizer,
        inputs: tuple[Tensor, ...],
        stream: torch.cuda.Stream | None,
    ) -> None:
        device = _device_of(optimizer)
        self._optimizer, self._stream = optimizer, stream
        self._inputs = [torch.empty_like(tensor, device=device) for tensor in inputs]
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        optimizer.zero_grad(set_to_none=True)  # the gradients' memory is the recording's
        with _recordable(optimizer, self._rates):
            self._capture(partial(update, _pairs(self._inputs)))

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The update of these inputs, at the rates that the optimizer's groups hold now."""
        for kept, tensor in zip(self._inputs, inputs, strict=True):
            kept.copy_(tensor, non_blocking=True)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            _hand_over(group["lr"], rate)
        loss, grad_norm = self._run()
        return loss.clone(), grad_norm.clone()

    def _capture(self, update: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Threads of a data loader may go on using CUDA meanwhile.
        options = {"stream": self._stream, "capture_error_mode": "thread_local"}
        device = self._stream.device
        with torch.cuda.device(device), _stream_restored(device), torch.cuda.graph(self._graph, **options):
            self._outputs = update()

    def _run(self) -> tuple[Tensor, Tensor]:
        self._graph.replay()
        return self._outputs


@contextmanager
def _recordable(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """An optimizer that reads its rates, one a group, from these tensors, and may be recorded."""
    before = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)


def _hand_over(lr: float | Tensor, rate: Tensor) -> None:
    """Writes a rate to where the recording reads it, without waiting for a device."""
    if isinstance(lr, Tensor) and lr.device == rate.device:
        rate.copy_(lr.reshape(()))
    else:
        rate.fill_(float(lr))


@contextmanager
def _stream_restored(device: torch.device) -> Iterator[None]:
    """The current stream is again what it was, which torch forgets where a recording fails."""
    current = torch.cuda.current_stream(device)
    try:
        yield
    finally:
        torch.cuda.set_stream(current)


@contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """On the stream that will record, as torch asks of what runs before."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not is_fused_optimizer(optimizer):
        raise ValueError(f"optimizer must be one of torch's, built with fused=True; got {type(optimizer).__name__}")
    if any(group.get("dampening", 0) and group["momentum"] for group in optimizer.param_groups):
        raise ValueError("optimizer must have no dampening: its first update cannot be left out where it is not finite")
    _device_of(optimizer)


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"optimizer must have parameters on one device, got {found}")
    return devices.pop()


def _check_recomputation(model: object) -> None:
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if getattr(module, "restores_random_state", False):
            raise ValueError(
                f"model must not compute again what drops elements, in {name or 'itself'}: set use_checkpoint to False"
                " or drop_rate and attn_drop_rate to 0; a CUDA graph cannot restore the random generator's state"
            )


def _pairs(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _text(layout: Layout) -> str:
    return ", ".join(f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in layout)
