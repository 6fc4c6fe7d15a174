"""accelerate on modules of the shape of mmpretrain's and mmdetection's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim_fast import accelerate
from tests.interop.official_like import CHANNELS, WINDOW, DropPath, WindowAttention, WindowAttentionV2
from tests.interop.unchanged import assert_unchanged, forward_calls, randomised


class WindowMSA(WindowAttention):
    pass


class WindowMSAV2(WindowAttentionV2):
    pass


class ShiftWindowMSA(nn.Module):
    """Tokens (B, L, C) of a grid that is padded, then rolled."""

    def __init__(self, kind: type[nn.Module], shift_size: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.window_size, self.shift_size = WINDOW, shift_size
        self.w_msa = kind(attn_drop)
        self.drop = DropPath(0.4)

    def between_regions(self, height: int, width: int) -> Tensor | None:
        if self.shift_size == 0:
            return None
        rows, columns = (
            (torch.arange(n) >= n - WINDOW).int() + (torch.arange(n) >= n - self.shift_size).int()
            for n in (height, width)
        )
        regions = self.cut((3 * rows[:, None] + columns)[None, ..., None])
        return -100.0 * (regions != regions.transpose(1, 2))

    def cut(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        height, width = hw_shape
        bottom, right = -height % WINDOW, -width % WINDOW
        x = F.pad(query.unflatten(1, hw_shape), (0, 0, 0, right, 0, bottom))
        grid = x.shape[1:3]
        windows = self.w_msa(
            self.cut(x.roll((-self.shift_size, -self.shift_size), (1, 2))), mask=self.between_regions(*grid)
        )
        x = windows.view(-1, grid[0] // WINDOW, grid[1] // WINDOW, WINDOW, WINDOW, CHANNELS).transpose(2, 3)
        x = x.reshape(-1, *grid, CHANNELS).roll((self.shift_size, self.shift_size), (1, 2))
        return self.drop(x[:, :height, :width].flatten(1, 2))


class Layers(nn.ModuleList):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        for layer in self:
            x = x + layer(x, grid)
        return x


def tokens(grid: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, grid[0] * grid[1], CHANNELS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", [WindowMSA, WindowMSAV2])
@pytest.mark.parametrize("grid", [(8, 12), (9, 7)], ids=["whole windows", "padded"])
def test_shifted_windows_are_unchanged(kind: type[nn.Module], grid: tuple[int, int]) -> None:
    model = randomised(Layers([ShiftWindowMSA(kind, 0), ShiftWindowMSA(kind, 2)]))
    report = assert_unchanged(model, lambda m, dtype: m(tokens(grid).to(dtype), grid), modules=2, ops=2)
    assert report.left == {}
    assert set(report.notes) == {"1"}


@pytest.mark.parametrize("grid", [(4, 8), (3, 8)])
def test_a_grid_of_one_window_takes_its_own_forward_where_shifted(grid: tuple[int, int]) -> None:
    model = randomised(Layers([ShiftWindowMSA(WindowMSA, 2)])).eval()
    wanted = model(tokens(grid), grid)
    accelerate(model, backend="native")
    assert forward_calls(lambda: model(tokens(grid), grid)) == 0
    assert torch.equal(model(tokens(grid), grid), wanted)


def test_a_window_attention_in_an_unknown_block_is_listed() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.msa = WindowMSA()

    report = accelerate(nn.ModuleList([Block(), Block()]))
    assert set(report.left) == {"0.msa", "1.msa"}
    assert set(report.left.values()) == {"WindowMSA has none of the forms that are known"}
