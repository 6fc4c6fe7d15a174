"""What a block does besides its products and this library's ops: next to nothing, and nothing may be added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from benchmarks.counting import count
from simmim_fast import MaskGenerator, create_model
from simmim_fast.models.layers import Stream
from simmim_fast.models.swin import BasicLayer, PatchMerging
from simmim_fast.models.swin_v2 import PatchMergingV2

SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "num_heads": (1, 2)}
VIT = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "qkv_bias": True, "init_values": 0.1}
SIZE = 32

# Of one block's forward and backward, with stochastic depth.
DONE = {
    "mm": 11,  # four products and their two gradients each, but one that takes its bias along
    "addmm": 1,  # that of q, k and v
    "sum": 1,  # the gradient of their bias
    "bernoulli_": 2,  # which samples keep the branch, of attention and of the MLP
    "div_": 2,
    "_foreach_copy_": 2,  # weights cast together and biases that leave the block, and their gradients
}
JOINED_BIASES = {"cat": 1, "zeros_like": 1}  # of q and v, none of k: (3C)
SWINV2 = {
    **JOINED_BIASES,
    "add": 2,  # gradients of the stream, which a product and the sum read: the norm is behind the branch
    # the position MLP over the offsets of a window, once
    "mm": 15,  # one more forward, three backward
    "addmm": 2,
    "relu": 1,
    "sigmoid": 1,
    "mul": 2,  # by 16
    "threshold_backward": 1,
    "sigmoid_backward": 1,
    "sum": 2,
}
CAST_AGAIN = {"_to_copy": 1}  # the weight behind the GELU, in the backward, instead of storing it
SWINV2_CASTS = {"_to_copy": 1 + 7 + 4}  # the position MLP's operands and gradients; the fp32 stream for two products
FUSED = ("residual_layer_norm", "bias_gelu")
TIMES = {"residual_layer_norm": 2, "bias_gelu": 1, "shifted_window_attention": 1, "biased_attention": 1}

CASES = {
    "swin": (DONE, CAST_AGAIN, (*FUSED, "shifted_window_attention")),
    "swinv2": (DONE | SWINV2, SWINV2_CASTS, (*FUSED, "shifted_window_attention")),
    # a slice of the biases' gradient is put into zeros for each of q and v
    "vit": (DONE | JOINED_BIASES | {"zeros": 1}, CAST_AGAIN, (*FUSED, "biased_attention")),
}


def operators(step: Callable[[], object]) -> Counter[str]:
    """How often each operator is called, by its name."""
    return Counter(call.op.split(".")[-1] for call in count(step).calls)


def of_a_step(encoder: str, blocks: int, autocast: bool) -> Counter[str]:
    """All operators of a forward and a backward; of a Swin, the blocks are those of the first stage."""
    torch.manual_seed(0)
    sizes = {**VIT, "depth": blocks} if encoder == "vit" else {**SWIN, "depths": (blocks, 1)}
    model = create_model(encoder, img_size=SIZE, backend="native", drop_path_rate=0.1, **sizes)
    masks = MaskGenerator(SIZE, 16, sizes["patch_size"], 0.6)
    images, mask = torch.randn(2, 3, SIZE, SIZE), masks.batch(2)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images, mask)
        loss.backward()

    step()
    model.zero_grad()
    return operators(step)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("encoder", CASES)
def test_a_block_copies_no_activations(encoder: str, autocast: bool) -> None:
    """No roll, partition, reverse, permute or contiguous copy, no sum of its own: two blocks more call this alone."""
    few, many = (of_a_step(encoder, blocks, autocast) for blocks in (2, 4))
    done, casts, fused = CASES[encoder]
    ours = {f"{op}_native{way}": TIMES[op] for op in fused for way in ("", "_backward")}
    assert {name: calls / 2 for name, calls in (many - few).items()} == done | ours | (casts if autocast else {})
    assert not few - many
    assert "roll" not in many


@pytest.mark.parametrize(
    ("merging", "rest"),
    [
        (PatchMerging, {"residual_layer_norm_native": 1, "residual_layer_norm_native_backward": 1}),
        (PatchMergingV2, {"native_layer_norm": 1, "native_layer_norm_backward": 1}),
    ],
)
def test_a_stage_ends_in_one_sum_and_one_gather(merging: type[PatchMerging], rest: dict[str, int]) -> None:
    stage = BasicLayer([], merging(16), use_checkpoint=False)
    stage.downsample.backend = "native"
    x, branch = (torch.randn(2, 4, 4, 16, requires_grad=True) for _ in range(2))
    bias = torch.randn(16, requires_grad=True)
    grad = torch.ones(2, 2, 2, 32)
    inputs = (x, branch, bias, *stage.parameters())
    done = operators(lambda: torch.autograd.grad(stage(Stream(x, branch, bias=bias)), inputs, grad))
    copies = {"clone": 2}  # the four neighbours side by side, and their gradients back
    sums = {"add": 2, "sum": 1}  # of the branch with its bias and of the stream with that; the bias's gradient
    assert done == rest | copies | sums | {"mm": 3}
