"""One update: accumulation, clipping, what is left out where something is not finite."""

from __future__ import annotations

import copy

import pytest
import torch

from simmim_fast import create_model
from simmim_fast.train import OptimizerConfig, build_optimizer, pretrain_groups, train_step

TINY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}


def small_model():
    torch.manual_seed(0)
    return create_model("swin", img_size=32, **TINY).double()


def uneven_batch():
    """Images and masks that hide a different number of patches in each image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.rand(6, 8, 8, generator=generator) < torch.linspace(0.1, 0.9, 6)[:, None, None]


@pytest.mark.parametrize("parts", [(3, 3), (1, 2, 3), (1,) * 6], ids=str)
def test_accumulation_equals_the_large_batch(parts):
    images, masks = uneven_batch()
    whole = small_model()
    split = copy.deepcopy(whole)
    results = []
    for model, micro_batches in (
        (whole, [(images, masks)]),
        (split, list(zip(images.split(parts), masks.split(parts), strict=True))),
    ):
        # SGD: Adam divides the gradient of the key's bias, which is 0 but for rounding, by its own size.
        optimizer = build_optimizer(pretrain_groups(model), OptimizerConfig(name="sgd"), 0.1)
        results.append([train_step(model, optimizer, micro_batches, 0.1) for _ in range(3)])
    for (loss, norm), (split_loss, split_norm) in zip(*results, strict=True):
        assert split_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert split_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)


def test_clipping_happens_once_on_the_whole_gradient():
    model = small_model()
    images, masks = uneven_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, norm = train_step(model, optimizer, list(zip(images.split(2), masks.split(2), strict=True)), 1e-3)
    assert norm.item() > 1e-3
    left = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert left.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [0, 2])
def test_an_update_that_is_not_finite_changes_nothing(name, bad):
    images, masks = uneven_batch()
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    results = []
    for batches in ([images] * 3, [*[images] * bad, broken, *[images] * (3 - bad)]):
        model = small_model()
        optimizer = build_optimizer(pretrain_groups(model), OptimizerConfig(name=name), 1e-2)
        scalars = [train_step(model, optimizer, [(batch, masks)], 1.0) for batch in batches]
        results.append((model, optimizer, scalars))
    (model, optimizer, _), (other, other_optimizer, scalars) = results
    assert [bool(loss.isfinite()) for loss, _ in scalars] == [step != bad for step in range(4)]
    assert not hasattr(other_optimizer, "found_inf")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key])


def test_a_loss_alone_that_is_not_finite_is_enough():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    batch = [(torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool))]
    loss, norm = train_step(lambda images, mask: parameter.sum() + float("inf"), optimizer, batch)
    assert loss.isinf()
    assert norm.isfinite()
    assert torch.equal(parameter.detach(), torch.ones(3))
