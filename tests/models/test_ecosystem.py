"""The models with what people put around them: compile, export, checkpointing, DDP, FSDP2, fake tensors, pickles."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from simmim_fast import MaskGenerator, SimMIM, create_model
from simmim_fast.models.recompute import RECOMPUTE
from simmim_fast.train.loop import train_step

ENCODERS = {
    "swin": {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    "swinv2": {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    "vit": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "use_mean_pooling": False},
}
SIZE = 32

every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def build(encoder: str, **options: object) -> SimMIM:
    torch.manual_seed(0)
    return create_model(
        encoder, img_size=SIZE, **{"backend": "native", "drop_path_rate": 0.0, **ENCODERS[encoder], **options}
    )


def batch(encoder: str, size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return images, masks_of(encoder).batch(size, generator=generator)


def masks_of(encoder: str) -> MaskGenerator:
    return MaskGenerator(SIZE, 16, ENCODERS[encoder]["patch_size"], 0.6)


def gradients(model: nn.Module, images: Tensor, mask: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(images, mask)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@every_encoder
@pytest.mark.parametrize("counts", [None, (8, 8)], ids=["dense", "counts"])
def test_a_step_never_waits_for_the_device(encoder: str, counts: tuple[int, int] | None) -> None:
    """Reading a value of a fake tensor raises, as it would make the host wait."""
    mode = FakeTensorMode()
    model = faked(build(encoder, drop_path_rate=0.1, counts=counts), mode)
    micro_batches = [tuple(mode.from_tensor(tensor) for tensor in batch(encoder))] * 2
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with mode:
        loss, norm = train_step(model, optimizer, micro_batches, clip_grad=5.0, bf16=True)
    assert (loss.shape, norm.shape) == ((), ())


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with fake parameters and buffers."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach())))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))
    return model


@every_encoder
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_a_dynamic_batch(encoder: str, engine: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(engine)
    model = build(encoder)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (2, 3, 5):
        expected = gradients(model, *batch(encoder, size))
        assert_close(gradients(compiled, *batch(encoder, size)), expected)
    assert counter.frame_count <= 2, "recompiled for the third batch size"


@every_encoder
def test_compiles_whole_as_it_is_trained(encoder: str) -> None:
    """Under autocast, with stochastic depth, and with what each mask shows known: the samples drawn are dynamo's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = build(encoder, drop_path_rate=0.5, recompute="mlp").train()
    model.counts = masks_of(encoder).counts
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (2, 3, 5):
        results = []
        for trained in (model, compiled):
            torch.manual_seed(size)
            with torch.autocast("cpu", torch.bfloat16):
                results.append(gradients(trained, *batch(encoder, size)))
        for eager, one in zip(*results, strict=True):  # elementwise operations in a row are rounded to bfloat16 once
            assert torch.linalg.norm(one - eager) <= 2**-6 * torch.linalg.norm(eager)
    assert counter.frame_count <= 2, "recompiled for the third batch size"


@every_encoder
def test_compiles_block_by_block(encoder: str) -> None:
    torch._dynamo.reset()
    model = build(encoder)
    expected = gradients(model, *batch(encoder))
    for block in blocks_of(model):
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, *batch(encoder)), expected)


def blocks_of(model: SimMIM) -> list[nn.Module]:
    encoder = model.encoder
    return list(encoder.blocks) if hasattr(encoder, "blocks") else [b for s in encoder.layers for b in s.blocks]


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_checkpointing_recomputes_the_same(encoder: str) -> None:
    expected = gradients(build(encoder), *batch(encoder))
    actual = gradients(build(encoder, use_checkpoint=True), *batch(encoder))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@every_encoder
def test_exports_the_encoder(encoder: str) -> None:
    model = build(encoder).eval()
    any_size = torch.export.Dim("images", min=1, max=64)
    program = torch.export.export(model.encoder, batch(encoder), dynamic_shapes=({0: any_size}, {0: any_size}))
    others = batch(encoder, 5)
    torch.testing.assert_close(program.module()(*others), model.encoder(*others))


@every_encoder
def test_copies_and_pickles(encoder: str) -> None:
    model = build(encoder)
    expected = gradients(model, *batch(encoder))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, *batch(encoder)), expected, strict=True))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_encoder
@pytest.mark.usefixtures("process_group")
def test_ddp(encoder: str) -> None:
    expected = gradients(build(encoder), *batch(encoder))
    assert_close(gradients(DistributedDataParallel(build(encoder)), *batch(encoder)), expected)


def sharded_apart(model: SimMIM) -> dict[str, list[nn.Module]]:
    """What people shard on its own before they shard the whole, by a name of the plan."""
    encoder, blocks = model.encoder, blocks_of(model)
    stages = list(getattr(encoder, "layers", []))
    layers = [layer for block in blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
    return {
        "patches, blocks and stages": [encoder.patch_embed, *blocks, *stages],
        "nothing": [],
        "encoder and head": [*blocks, encoder, model.decoder],
        "parts of patches and head": [*encoder.patch_embed.children(), encoder.norm, model.decoder[0]],
        "norms, attention and MLPs": [m for b in blocks for m in (b.norm1, b.attn, b.norm2, b.mlp)],
        "layers": layers,
        "shared bias and mergings": [m for name, m in model.named_modules() if name.endswith(("pos_bias", "sample"))],
    }


def _train_in_shards(rank: int, ranks: int, group: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=ranks)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    positions = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}
    options = {"swin": {"ape": True}, "swinv2": {}, "vit": {"init_values": 0.1, "qkv_bias": True, **positions}}
    for encoder in ENCODERS:
        expected = gradients(build(encoder, **options[encoder]), *batch(encoder))
        first, *others = sharded_apart(build(encoder, **options[encoder]))
        for plan, recompute in (*itertools.product([first], RECOMPUTE), *itertools.product(others, ["pointwise"])):
            model = build(encoder, recompute=recompute, **options[encoder])
            for module in (*sharded_apart(model)[plan], model):
                fully_shard(module, mesh=mesh)
            loss, *shards = gradients(model, *batch(encoder))
            assert_close([loss, *(shard.full_tensor() for shard in shards)], expected)
    torch.distributed.destroy_process_group()


def test_fsdp2(tmp_path: Path) -> None:
    """With two ranks a module's parameters are gone outside its forward, as they are not with one."""
    torch.multiprocessing.spawn(_train_in_shards, (2, f"{tmp_path}/group"), nprocs=2)
