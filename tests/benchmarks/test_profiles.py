"""Where the time of a step goes: kinds of operators, and the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import profiles
from tests.benchmarks.made_rows import row


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::bmm", "products"),
        ("simmim_fast::shifted_window_attention_native_backward", "attention"),
        ("aten::_softmax", "attention"),
        ("simmim_fast::residual_layer_norm_native", "norms"),
        ("aten::native_layer_norm_backward", "norms"),
        ("simmim_fast::bias_gelu_native", "GELU"),
        ("simmim_fast::linear_masked_loss_native", "head, embedding"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_norm", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::_foreach_copy_", "copies"),
        ("aten::mul", "other"),
    ],
)
def test_operators_have_a_kind(operator: str, kind: str) -> None:
    assert profiles.kind(operator) == kind


def test_shares_are_of_what_was_run() -> None:
    a = torch.randn(300, 300)
    found = profiles.shares(lambda: (a @ a).softmax(-1), "cpu")
    assert found is not None
    assert sum(found.values()) == pytest.approx(1)
    assert found["products"] > found["attention"] > 0 == found["norms"] == found["GELU"]
    assert profiles.shares(lambda: None, "cpu") is None


def test_the_table_has_a_line_a_contestant() -> None:
    shares = dict.fromkeys((*profiles.KINDS, profiles.OTHER), 0.125)
    arguments = {"model": "vit_base_224", "dtype": "fp32", "batch": 8}
    made = [row("profile", "cpu", name, arguments=arguments, shares=shares) for name in ("reference", "fast")]
    lines = list(profiles.profile_table(made, "cpu"))
    cells = " | ".join(["12.5%"] * len(shares))
    assert lines[2:4] == [f"| vit_base_224, fp32, batch 8 | `{name}` | {cells} |" for name in ("fast", "reference")]
    assert "a processor (avx), 2 threads" in lines[-2]
    assert list(profiles.profile_table(made, "cuda")) == ["Not measured yet.", ""]
