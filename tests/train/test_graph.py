"""The update as a graph: what each call computes, what may change between calls, what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import simmim_fast
from simmim_fast import MaskGenerator, create_model
from simmim_fast.train import GraphedStep, OptimizerConfig, build_optimizer, graph, pretrain_groups, train_step

TINY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}
SIZE = 32


def start(device: str = "cpu", name: str = "adamw", **options: object):
    """A model and its optimizer."""
    torch.manual_seed(0)
    masks = MaskGenerator(SIZE, 8, 4)
    model = create_model("swin", img_size=SIZE, **{**TINY, **options}).to(device)
    model.counts = masks.counts
    return model, build_optimizer(pretrain_groups(model), OptimizerConfig(name=name), 1e-2)


def batches(number: int, size: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    masks = MaskGenerator(SIZE, 8, 4)
    return [
        (torch.randn(size, 3, SIZE, SIZE, generator=generator), masks.batch(size, generator=generator))
        for _ in range(number)
    ]


def assert_equal_states(one: tuple, other: tuple) -> None:
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in one[1].state[p].items():
            assert torch.equal(value, other[1].state[q][key])


class Rerun(graph.Recording):
    """Makes the update anew, on the memory of the recording, where a GPU would replay its kernels."""

    made = 0

    def _capture(self, update) -> None:
        type(self).made += 1
        self._update = update

    def _run(self) -> tuple[Tensor, Tensor]:
        with graph._recordable(self._optimizer, self._rates):
            return self._update()


@pytest.fixture
def recording(monkeypatch):
    """Takes the CPU for a device that records."""
    monkeypatch.setattr(Rerun, "made", 0)
    monkeypatch.setattr(graph, "Recording", Rerun)
    monkeypatch.setattr(graph, "_beside", lambda stream: nullcontext())
    monkeypatch.setattr(GraphedStep, "_is_recorded", lambda self: True)
    return Rerun


def run_both(name: str, precision: str = "fp32", device: str = "cpu", parts: int = 1, updates: int = 6):
    """The same updates by `train_step` and by a `GraphedStep`, at rates that change."""
    plain, graphed = start(device, name), start(device, name)
    step = GraphedStep(*graphed, clip_grad=0.1, precision=precision)
    for number, (images, mask) in enumerate(batches(updates, 2 * parts)):
        for group in (*plain[1].param_groups, *graphed[1].param_groups):
            group["lr"] = 2.0**-number  # the same in float32 and float64
        pairs = list(zip(images.to(device).chunk(parts), mask.to(device).chunk(parts), strict=True))
        expected = train_step(*plain, pairs, 0.1, bf16=precision == "bf16")
        assert all(map(torch.equal, step(*chain.from_iterable(pairs)), expected))
    return plain, graphed


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", graph.PRECISIONS)
def test_equals_train_step(name, precision):
    assert_equal_states(*run_both(name, precision))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_memory_of_a_recording_takes_inputs_and_rates(recording, name, parts):
    plain, graphed = run_both(name, parts=parts)
    assert_equal_states(plain, graphed)
    assert recording.made == 1


def test_a_scheduler_goes_on_after_the_recording(recording):
    results = []
    for build in (GraphedStep, lambda model, optimizer, **_: lambda *pair: train_step(model, optimizer, [pair])):
        model, optimizer = start()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = build(model, optimizer, precision="fp32")
        for images, mask in batches(6):
            step(images, mask)
            scheduler.step()
        results.append((model, optimizer))
    assert results[0][1].param_groups[0]["lr"] == pytest.approx(1e-2 / 2**6)
    for p, q in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)  # the recording's rates are float32


def test_records_anew_after_another_state_is_loaded(recording):
    model, optimizer = start()
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    first, *rest = batches(4)
    step(*first)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    one = [step(*batch) for batch in rest]
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    other = [step(*batch) for batch in rest]
    assert recording.made == 2
    assert all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_an_update_that_is_not_finite_is_left_out(recording):
    model, optimizer = start()
    step = GraphedStep(model, optimizer, eager_calls=1, precision="fp32")
    (first, mask), *_ = batches(1)
    step(first, mask)
    before = copy.deepcopy(model.state_dict())
    loss, _ = step(torch.full_like(first, float("nan")), mask)
    assert loss.isnan()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(first, mask)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_returned_numbers_are_not_overwritten(recording):
    step = GraphedStep(*start(), precision="fp32", eager_calls=1)
    scalars = [step(*batch)[0] for batch in batches(3)]
    assert len({scalar.data_ptr() for scalar in scalars}) == 3


def test_a_failed_recording_leaves_the_optimizer_as_it_was(recording, monkeypatch):
    def fail(self, update):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, optimizer = start()
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    first, second = batches(2)
    step(*first)
    before = [{**group, "params": None} for group in optimizer.param_groups]
    monkeypatch.setattr(recording, "_capture", fail)
    with pytest.raises(RuntimeError, match="not permitted"):
        step(*second)
    assert [{**group, "params": None} for group in optimizer.param_groups] == before
    train_step(model, optimizer, [second])


def test_a_failed_recording_leaves_the_stream_as_it_was(monkeypatch):
    """As torch has it: its context sets the stream back only where the capture ends well."""
    current = ["before"]

    class Capture:
        def __init__(self, recorded, stream, **options):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, *raised):
            raise RuntimeError("invalidated")

    stream = SimpleNamespace(device="cuda:0")
    fakes = {"CUDAGraph": object, "graph": Capture, "device": nullcontext, "set_stream": current.append}
    for name, fake in {**fakes, "current_stream": lambda device: current[-1]}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    optimizer = start()[1]
    with pytest.raises(RuntimeError, match="invalidated"):
        graph.Recording(lambda pairs: (torch.zeros(()),) * 2, optimizer, batches(1)[0], stream)
    assert current == ["before", stream, "before"]


def test_settings_of_the_optimizer_stay_what_they_are(recording):
    model, optimizer = start()
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    before = [{**group, "params": None} for group in optimizer.param_groups]
    for batch in batches(3):
        step(*batch)
    assert recording.made == 1
    assert [{**group, "params": None} for group in optimizer.param_groups] == before


def test_a_rate_that_is_a_tensor_stays_and_is_read(recording):
    model, _ = start()
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    first, second, third = batches(3)
    step(*first)
    before = copy.deepcopy(model.state_dict())
    step(*second)
    assert optimizer.param_groups[0]["lr"] is rate
    after = copy.deepcopy(model.state_dict())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    rate.fill_(0)
    step(*third)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_an_empty_group_comes_first():
    model, _ = start()
    groups = [{"params": []}, {"params": list(model.parameters())}]
    step = GraphedStep(model, torch.optim.AdamW(groups, fused=True), precision="fp32")
    assert step(*batches(1)[0])[0].isfinite()


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_activation_checkpointing_goes_without_dropout(recording, encoder):
    options = {**TINY, "img_size": SIZE, "use_checkpoint": True, "drop_path_rate": 0.5}
    model = create_model(encoder, **options)
    step = GraphedStep(model, torch.optim.AdamW(model.parameters(), fused=True), precision="fp32", eager_calls=1)
    assert all(step(*batch)[0].isfinite() for batch in batches(2))
    for dropout in ({"drop_rate": 0.1}, {"attn_drop_rate": 0.1}):
        model = create_model(encoder, **options, **dropout)
        expected = r"model must not compute again what drops elements, in encoder.layers.0: set use_checkpoint to False"
        with pytest.raises(ValueError, match=expected):
            GraphedStep(model, torch.optim.AdamW(model.parameters(), fused=True))


def test_an_optimizer_does_not_keep_it_alive(recording):
    model, optimizer = start()
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    for batch in batches(2):
        step(*batch)
    alive = weakref.ref(step)
    del step
    gc.collect()
    assert alive() is None
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_foreign_optimizer_may_not_say_that_it_is_fused():
    class Foreign(torch.optim.Optimizer):
        pass

    with pytest.raises(ValueError, match="must be one of torch's"):
        GraphedStep(start()[0], Foreign([torch.nn.Parameter(torch.ones(1))], {"fused": True}))


def test_is_a_public_name():
    assert simmim_fast.GraphedStep is GraphedStep
    with pytest.raises(AttributeError, match="no attribute 'GraphStep'"):
        _ = simmim_fast.GraphStep


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp16"}, ValueError, "precision must be one of bf16, fp32, got 'fp16'"),
        ({"clip_grad": 0.0}, ValueError, "clip_grad must be positive, or None for no clipping, got 0.0"),
        ({"clip_grad": "x"}, TypeError, "clip_grad must be a number or None, got 'x'"),
        ({"eager_calls": 0}, ValueError, "eager_calls must be at least 1, got 0"),
        ({"eager_calls": 2.5}, TypeError, "eager_calls must be an integer, got 2.5"),
        ({"eager_calls": True}, TypeError, "eager_calls must be an integer, got True"),
    ],
    ids=str,
)
def test_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        GraphedStep(*start(), **options)


def test_refuses_optimizers_that_cannot_leave_an_update_out():
    model, _ = start()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got SimMIM"):
        GraphedStep(model, model)
    with pytest.raises(ValueError, match="optimizer must be one of torch's, built with fused=True; got AdamW"):
        GraphedStep(model, torch.optim.AdamW(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, dampening=0.1, fused=True)
    with pytest.raises(ValueError, match="optimizer must have no dampening"):
        GraphedStep(model, sgd)
    empty = torch.optim.AdamW([{"params": []}], fused=True)
    with pytest.raises(ValueError, match="optimizer must have parameters on one device, got no parameters"):
        GraphedStep(model, empty)
    with pytest.raises(TypeError, match=r"model must be callable as model\(images, mask\), got dict"):
        GraphedStep({}, torch.optim.AdamW(model.parameters(), fused=True))


def test_refuses_inputs_of_another_layout_and_goes_on():
    step = GraphedStep(*start(), precision="fp32")
    ((images, mask),) = batches(1)
    with pytest.raises(ValueError, match="inputs must be pairs of images and mask, got 1 tensors"):
        step(images)
    with pytest.raises(TypeError, match="inputs must be tensors, got int"):
        step(1, 2)
    with pytest.raises(TypeError, match=r"mask must be bool or integer, got torch.float32"):
        step(images, mask.float())
    with pytest.raises(ValueError, match="images must have shape"):
        step(images[:, :1], mask)
    step(images, mask)
    expected = r"as in the first call, \(2, 3, 32, 32\) float32, \(2, 8, 8\) bool, got \(1, 3, 32, 32\) float32"
    with pytest.raises(ValueError, match=expected):
        step(images[:1], mask[:1])
    step(images, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.smoke), "sgd"])
@pytest.mark.parametrize("precision", graph.PRECISIONS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_replay_equals_train_step(name, precision, parts):
    assert_equal_states(*run_both(name, precision, "cuda", parts, updates=10))


@pytest.mark.gpu
def test_a_replay_draws_stochastic_depth_anew():
    model, optimizer = start("cuda", drop_path_rate=0.5)
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ((images, mask),) = batches(1, 16)
    assert len({step(images, mask)[0].item() for _ in range(6)}) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_a_replay_recomputes_what_it_drew(encoder):
    results = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        options = {**TINY, "img_size": SIZE, "drop_path_rate": 0.5, "use_checkpoint": use_checkpoint}
        model = create_model(encoder, **options).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
        step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
        torch.manual_seed(1)
        results.append([tuple(value.item() for value in step(*batch)) for batch in batches(6)])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


class Waiting(torch.nn.Linear):
    """A model that reads a number from the device."""

    def forward(self, images, mask):
        loss = super().forward(images).abs().mean()
        return loss * 2 if loss.item() > 0 else loss


def _fail_to_record(rank: int) -> None:
    model = Waiting(SIZE, SIZE).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    first, second = batches(2)
    step(*first)
    stream = torch.cuda.current_stream()
    before = [{**group, "params": None} for group in optimizer.param_groups]
    with pytest.raises(RuntimeError):
        step(*second)
    assert torch.cuda.current_stream() == stream
    assert [{**group, "params": None} for group in optimizer.param_groups] == before
    loss, _ = train_step(model, optimizer, [tuple(tensor.cuda() for tensor in second)])
    assert loss.item() > 0


@pytest.mark.gpu
def test_a_model_that_waits_is_refused_and_leaves_all_as_it_was():
    """In a process of its own, since torch promises nothing of its allocator afterwards."""
    torch.multiprocessing.spawn(_fail_to_record, nprocs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_replay_reads_a_rate_that_is_a_tensor(device):
    model, _ = start("cuda")
    rate = torch.tensor(1e-2, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    first, second, third = batches(3)
    step(*first)
    step(*second)
    before = copy.deepcopy(model.state_dict())
    rate.fill_(0)
    step(*third)
    assert optimizer.param_groups[0]["lr"] is rate
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
def test_eager_calls_after_another_state_warn_of_nothing(recwarn):
    model, optimizer = start("cuda")
    step = GraphedStep(model, optimizer, precision="fp32", eager_calls=1)
    for batch in batches(3):
        step(*batch)
    optimizer.load_state_dict(optimizer.state_dict())
    for batch in batches(3):
        step(*batch)
    assert [str(warning.message) for warning in recwarn if "capturable" in str(warning.message)] == []
