"""The step benchmark: its command line on small models, its arithmetic, and that a wrong contestant gets no speed."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import step, trainees
from benchmarks.attention import ATTENTIONS
from benchmarks.limits import Limits, limits
from benchmarks.models import build, draw_inputs
from benchmarks.peers import Peer, hugging_face, timm_swin
from benchmarks.results import read_rows
from benchmarks.trainees import Setting, Trainee, with_attention
from simmim_fast.models import SimMIM
from simmim_fast.testing import relative_error

MICRO = ("swin_micro_96", "vit_micro_96")
SMALL = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
SMALL_PEERS = {
    "swin": {"encoder": "swin", **SMALL},
    "swinv2": {"encoder": "swinv2", **SMALL, "norm_target": True},
    "vit": {**step.MODELS["vit_micro_96"], "img_size": 64, "embed_dim": 32, "depth": 2},
}
LIMIT = Limits(flops_per_image=10.0, bytes_per_image=2.0, matrix_flops_per_second=400.0, bytes_per_second=160.0)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes seconds."""
    monkeypatch.setattr(step, "limits", lambda *_: LIMIT)


@pytest.fixture
def peers() -> None:
    for package in ("timm", "transformers"):
        pytest.importorskip(package, reason=f"not run: {package} is not installed (requirements-dev.txt pins it)")


def run_step(results: Path, *contestants: str, models: tuple[str, ...] = MICRO, pairs: int = 3) -> None:
    options = ["--device", "cpu", "--models", *models, "--dtype", "fp32", "--batch", "2", "--pairs", str(pairs)]
    step.main([*options, "--tests", "passed", "--contestants", *contestants, "--results", str(results)])


def test_every_contestant_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_step(tmp_path / "rows.jsonl", "fast", "reference", "sdpa")
    rows, printed = read_rows(tmp_path / "rows.jsonl"), capsys.readouterr().out
    assert [(row["arguments"]["model"], row["contestant"]) for row in rows] == [
        (model, contestant) for model in MICRO for contestant in ("fast", "reference", "sdpa")
    ]
    for row in rows:
        rate = row["images_per_second"]
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        assert len(row["seconds"]) == 3
        assert len(row["times_faster_than"]) == 2
        assert f"{rate['median']:.2f}" in printed


def test_a_wrong_contestant_gets_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_another_bias(model: SimMIM, attend: object) -> None:
        torch.nn.init.constant_(model.decoder[0].bias, 1.0)

    monkeypatch.setattr(trainees, "with_attention", with_another_bias)
    with pytest.raises(SystemExit, match="sdpa is wrong: its loss is"):
        run_step(tmp_path / "rows.jsonl", "reference", "sdpa")
    assert not (tmp_path / "rows.jsonl").exists()
    assert "images/s" not in capsys.readouterr().out


def test_rates_ratios_and_shares() -> None:
    fast, slow = (
        step.Entrant(name, trainee=None, seconds=seconds)
        for name, seconds in (("fast", [1.0, 2.0, 4.0]), ("slow", [3.0, 2.0, 8.0]))
    )
    first, second = step.results([fast, slow], batch=8, limit=LIMIT)
    assert first["images_per_second"]["median"] == 4
    assert first["times_faster_than"] == {"slow": 2}
    assert second["times_faster_than"] == {"fast": 0.5}
    assert first["peak_bytes"] is None
    assert (first["mfu"], first["memory_share"]) == (0.1, 0.05)


def test_limits() -> None:
    limit = limits("vit_micro_96", "fp32", 2, "cpu")
    assert limit.flops_per_image > limit.bytes_per_image > 0
    assert limit.arithmetic == limit.matrix_flops_per_second / limit.flops_per_image
    assert limit.memory == limit.bytes_per_second / limit.bytes_per_image
    assert limit.as_json()["bytes_per_image"] == limit.bytes_per_image


def in_place_of_xformers(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor, scale: float | None) -> Tensor:
    """Takes (B, N, h, D), and a bias whose rows are aligned."""
    assert attn_bias.stride(-2) % 8 == 0
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [*MICRO, "swinv2"])
def test_others_attention_in_the_reference_is_the_reference(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops")}
    modules["xformers.ops"].memory_efficient_attention = in_place_of_xformers
    for module, stub in modules.items():
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.setitem(step.MODELS, "swinv2", SMALL_PEERS["swinv2"])
    torch.manual_seed(0)
    plain = build(name, backend="reference")
    fused = copy.deepcopy(plain)
    with_attention(fused, ATTENTIONS[attention])
    inputs = draw_inputs(plain, 2)
    has_backward = attention != "flex"  # on CUDA alone
    with torch.set_grad_enabled(has_backward):
        losses = [model.train(False)(*inputs) for model in (plain, fused)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    if has_backward:
        sum(losses).backward()
        for (key, expected), actual in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert relative_error(actual.grad, expected.grad) < 1e-4, key


@pytest.mark.parametrize("contestant", ["flex", "xformers", "fast_graph", "official", "hf", "timm", "mae"])
def test_who_cannot_run_says_why(contestant: str, peers: None) -> None:
    model = "vit_micro_96" if contestant == "timm" else "swin_micro_96"
    entrants, (line,) = step.race(Setting(model, "fp32", 1, "cpu"), [contestant], 1)
    assert entrants == []
    assert line.startswith(f"{contestant} does not run: ")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param("swin", lambda name: hugging_face(name, "eager"), id="hf swin"),
        pytest.param("swin", lambda name: hugging_face(name, "sdpa"), id="hf swin sdpa"),
        pytest.param("swinv2", lambda name: hugging_face(name, "eager"), id="hf swinv2"),
        pytest.param("vit", lambda name: hugging_face(name, "sdpa"), id="hf vit sdpa"),
        pytest.param("swin", timm_swin, id="timm"),
    ],
)
def test_a_peer_computes_what_the_reference_does(
    name: str, make: Callable[[str], Peer], monkeypatch: pytest.MonkeyPatch, peers: None
) -> None:
    monkeypatch.setitem(step.MODELS, name, SMALL_PEERS[name])
    peer = make(name)
    theirs, ours = Trainee(peer.model, "fp32", peer.call), Trainee(peer.like, "fp32")
    inputs = draw_inputs(peer.like, 2)
    for actual, expected in zip(theirs.gradients(*inputs), ours.gradients(*inputs), strict=True):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-4)


def test_another_method_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], peers: None) -> None:
    names = ["fast", "mae", "beit", "supervised"]
    run_step(tmp_path / "rows.jsonl", *names, models=("vit_micro_96",), pairs=1)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["contestant"], row["same_method"]) for row in rows] == [(name, name == "fast") for name in names]
    assert [row["mfu"] is None for row in rows] == [False, True, True, True]
    simmim, _, others = capsys.readouterr().out.partition("another method")
    assert "fast" in simmim
    assert "mae" not in simmim
    assert "mae" in others


def test_stochastic_depth_is_noticed() -> None:
    rates = {0.0: False, 0.5: True}
    for rate, expected in rates.items():
        assert Trainee(build("swin_micro_96", drop_path_rate=rate), "fp32").draws is expected


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, error in (
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--batch", "4", "-1"], "--batch must be at least 1, got -1"),
        (["--official", str(tmp_path)], "--official must be a checkout of microsoft/SimMIM"),
    ):
        with pytest.raises(SystemExit):
            step.parse(options)
        assert error in capsys.readouterr().err
