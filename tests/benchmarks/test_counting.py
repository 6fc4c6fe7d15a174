"""The counter against hand-made modules, whose bytes and FLOPs are known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import CASES, Case
from benchmarks.cost import cost, operator_calls
from benchmarks.counting import Traffic, count, hollow, no_data
from simmim_fast import ops
from simmim_fast.ops import OPS, flops
from simmim_fast.testing import differentiable, small_inputs

BATCH, WIDE, NARROW = 4, 8, 3
FP32 = 4  # bytes


class Tiny(nn.Module):
    """(B, WIDE) through one matrix to (B, NARROW), and the sum of the rectified outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NARROW, WIDE))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).relu().sum()


def of(traffic: Traffic) -> dict[str, tuple[int, int, int]]:
    """Calls, FLOPs and numbers of 4 bytes by operator."""
    names = dict.fromkeys(call.op for call in traffic.calls)
    return {
        name: (len(traffic.of(name).calls), traffic.of(name).flops, traffic.of(name).nbytes // FP32) for name in names
    }


def counted(step: Callable[[], object]) -> dict[str, tuple[int, int, int]]:
    return of(count(step))


@pytest.mark.parametrize("fake", [pytest.param(True, id="without data"), pytest.param(False, id="with data")])
def test_counts_a_forward_and_backward(fake: bool) -> None:
    model = Tiny()
    with no_data() if fake else nullcontext():
        model, x = hollow(model) if fake else model, torch.ones(BATCH, WIDE)
        traffic = count(lambda: model(x).backward(), kept=model.parameters())
    product, inputs, outputs, weight = 2 * BATCH * WIDE * NARROW, BATCH * WIDE, BATCH * NARROW, WIDE * NARROW
    assert of(traffic) == {
        "aten.mm": (2, 2 * product, 2 * (inputs + weight + outputs)),  # the gradient of x is not asked for
        "aten.relu": (1, 0, 2 * outputs),
        "aten.sum": (1, 0, outputs + 1),
        "aten.ones_like": (1, 0, 1),
        "aten.threshold_backward": (1, 0, 1 + 2 * outputs),  # the gradient of the sum is one number, expanded
    }
    assert traffic.saved == FP32 * (inputs + outputs)
    assert traffic.launches == len(traffic.calls) == 6
    assert traffic.flops == 2 * product


def test_views_and_allocations_are_no_calls() -> None:
    x = torch.ones(BATCH, WIDE)
    assert counted(lambda: x.t().view(WIDE, 2, -1)[:, 0].expand(5, -1, -1).detach()) == {}
    assert counted(lambda: (torch.empty(3), torch.empty_like(x), x.new_empty(2))) == {}


def test_what_is_overwritten_is_not_read() -> None:
    x, y, numbers = torch.ones(BATCH, WIDE), torch.zeros(BATCH, WIDE), BATCH * WIDE
    assert counted(lambda: x.zero_()) == {"aten.zero_": (1, 0, numbers)}
    assert counted(lambda: x.copy_(y)) == {"aten.copy_": (1, 0, 2 * numbers)}
    assert counted(lambda: x.add_(y)) == {"aten.add_": (1, 0, 3 * numbers)}
    assert counted(lambda: torch.zeros_like(x)) == {"aten.zeros_like": (1, 0, numbers)}


def test_lists_of_tensors_count_whole() -> None:
    xs = [torch.ones(3), torch.ones(5)]
    assert counted(lambda: torch.cat(xs)) == {"aten.cat": (1, 0, 16)}
    assert counted(lambda: torch._foreach_add(xs, 1.0)) == {"aten._foreach_add": (1, 0, 16)}


def test_attention_of_the_cpu_has_its_products_counted() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    traffic = count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    product = 2 * 2 * 16 * 16 * 8
    assert traffic.flops == (2 + 5) * product


def test_a_storage_is_saved_once_and_what_a_checkpoint_recomputes_is_not_saved() -> None:
    x, nbytes = torch.ones(BATCH, WIDE, requires_grad=True), FP32 * BATCH * WIDE

    def twice(x: Tensor) -> Tensor:
        return x.exp().exp()

    def both(x: Tensor) -> Tensor:
        return x.sin() + x.view(-1).cos().view_as(x)

    assert count(lambda: twice(x).sum().backward()).saved == 2 * nbytes
    assert count(lambda: both(x).sum().backward()).saved == nbytes
    assert count(lambda: both(x).sum().backward(), kept=[x]).saved == 0
    recomputed = count(lambda: checkpoint(twice, x * 1, use_reentrant=False).sum().backward())
    assert recomputed.saved == nbytes
    assert len(recomputed.of("aten.exp").calls) == 4


@pytest.mark.parametrize("op", OPS)
def test_our_operators_count_what_they_registered(op: str) -> None:
    wanted = tuple(differentiable(small_inputs(op, 2)))
    case = Case(op, "small", lambda batch, dtype, device, seed: small_inputs(op, batch, device=device), wanted)
    inputs = case.inputs(2, torch.float32, "cpu")
    function = partial(getattr(ops, op), backend="native")
    traffic = count(lambda: sum(out.sum() for out in tree_leaves(function(**inputs))).backward())
    own = [call for call in traffic.calls if call.op.startswith("simmim_fast.")]
    assert [call.op for call in own] == [f"simmim_fast.{op}_native", f"simmim_fast.{op}_native_backward"]
    assert tuple((call.nbytes, call.flops) for call in own) == cost(case, 2, torch.float32)
    assert all(call.launches > 0 for call in own)


def test_the_lower_bound_takes_each_call_at_its_own_limit() -> None:
    model, x = Tiny(), torch.randn(BATCH, WIDE)
    traffic = count(lambda: model(x))
    product, rest = traffic.of("aten.mm"), traffic.nbytes - traffic.of("aten.mm").nbytes
    assert traffic.seconds(peak=1.0, bandwidth=1e9) == pytest.approx(product.flops + rest / 1e9)
    assert traffic.seconds(peak=1e12, bandwidth=1.0) == pytest.approx(traffic.nbytes)


def test_a_limit_is_that_of_the_least_work_with_the_same_results() -> None:
    cases = CASES["linear_masked_loss"]
    for model in ("swin_base_192", "vit_base_224"):
        assert cost(cases[model], 2, torch.float32) == cost(cases[f"{model} listed"], 2, torch.float32)
        forward, _ = operator_calls(cases[model], 2, torch.float32)
        assert flops(forward[0], *forward[1]) > cost(cases[model], 2, torch.float32)[0][1]
