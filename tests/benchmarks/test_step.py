"""The step benchmark: its command line on small models, its arithmetic, and that a wrong contestant gets no speed."""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import agreement, step, trainees
from benchmarks.agreement import Disagreement, Findings, Oracle, findings
from benchmarks.attention import ATTENTIONS
from benchmarks.limits import Limits, limits
from benchmarks.models import build, copy_of, draw_inputs
from benchmarks.results import read_rows
from benchmarks.trainees import Setting, Trainee, trainee, with_attention
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


def run_step(results: Path, *contestants: str, models: tuple[str, ...] = MICRO, pairs: int = 3, **more: bool) -> None:
    options = ["--device", "cpu", "--models", *models, "--dtype", "fp32", "--batch", "2", "--pairs", str(pairs)]
    options += [f"--{name}" for name, wanted in more.items() if wanted]
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


def test_a_profile_is_a_row_beside_that_of_the_step(tmp_path: Path) -> None:
    run_step(tmp_path / "rows.jsonl", "fast", "reference", models=MICRO[:1], pairs=1, profile=True)
    rows = read_rows(tmp_path / "rows.jsonl")
    written = [(row["benchmark"], row["contestant"]) for row in rows]
    assert written == [(kind, name) for kind in ("step", "profile") for name in ("fast", "reference")]
    for row in rows[2:]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"]["products"] > 0 < row["shares"]["norms"]


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


TABLE = "encoder.layers.1.blocks.0.attn.relative_position_bias_table"


def without_a_table(name: str, gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient) if name == TABLE else gradient


def with_two_stages_negated(name: str, gradient: Tensor) -> Tensor:
    return -gradient if name.startswith(("encoder.layers.1", "encoder.layers.2")) else gradient


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", [without_a_table, with_two_stages_negated])
def test_a_wrong_gradient_that_hardly_changes_the_norm_is_found(
    spoil: Callable[[str, Tensor], Tensor], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_spoilt_gradients(model: SimMIM, attend: object) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: spoil(name, gradient))

    with monkeypatch.context() as spoilt:
        spoilt.setattr(trainees, "with_attention", with_spoilt_gradients)
        with pytest.raises(Disagreement, match=r"sdpa is wrong: its gradient of encoder\.layers\.1"):
            step.race(Setting("swin_micro_96", dtype, 2, "cpu"), ["sdpa"], 1)


def test_a_norm_may_round_by_what_bf16_rounds_of_the_whole() -> None:
    expected = {"norm1.bias": torch.tensor([1e-3]), "fc1.weight": torch.tensor([1.0])}
    rounded = {**expected, "norm1.bias": torch.tensor([2e-3])}
    agreement.check_gradients("timm", rounded, expected, "bf16")
    with pytest.raises(Disagreement, match=r"its gradient of norm1\.bias has the relative distance 1 "):
        agreement.check_gradients("timm", rounded, expected, "fp32")
    expected, rounded = (
        {name.replace("norm1", "fc1"): one for name, one in each.items()} for each in (expected, rounded)
    )
    with pytest.raises(Disagreement, match=r"its gradient of fc1\.bias "):
        agreement.check_gradients("timm", rounded, expected, "bf16")


@pytest.mark.parametrize("model", MICRO)
def test_honest_ones_agree_in_bf16(model: str) -> None:
    entrants, absent = step.race(Setting(model, "bf16", 2, "cpu"), ["fast", "sdpa"], 1)
    assert [one.name for one in entrants] == ["fast", "sdpa"]
    assert absent == {}


def test_who_fails_is_named_and_the_others_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unable(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(trainees, "with_attention", unable)
    run_step(tmp_path / "rows.jsonl", "sdpa", "reference", models=("vit_micro_96",))
    assert "sdpa does not run: RuntimeError: no kernel image is available for this device" in capsys.readouterr().out
    measured, absent = read_rows(tmp_path / "rows.jsonl")
    assert (measured["contestant"], len(measured["seconds"])) == ("reference", 3)
    assert (absent["contestant"], absent["arguments"]) == ("sdpa", measured["arguments"])
    assert absent["absent"] == "RuntimeError: no kernel image is available for this device"


def test_who_runs_out_of_memory_while_it_is_timed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(entrant: step.Entrant, *rest: object) -> None:
        if entrant.name == "sdpa" and entrant.seconds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(entrant, *rest)

    original = step._time
    monkeypatch.setattr(step, "_time", timed)
    entrants, absent = step.race(Setting("vit_micro_96", "fp32", 1, "cpu"), ["sdpa", "reference"], 3)
    assert [(one.name, len(one.seconds)) for one in entrants] == [("reference", 3)]
    assert absent == {"sdpa": "OutOfMemoryError: CUDA out of memory"}


def test_many_compiled_forms_with_stochastic_depth_race(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {f"compiled_{number}": trainees._Form("reference", mode="default") for number in range(5)}
    monkeypatch.setattr(trainees, "_OURS", {**trainees._OURS, **forms})
    compiled = torch.compile
    monkeypatch.setattr(  # a compiler of its own for each, as modes are
        torch, "compile", lambda model, **_: compiled(model, fullgraph=True, backend=lambda graph, _: graph.forward)
    )
    monkeypatch.setitem(step.MODELS, "dropping", {**SMALL_PEERS["vit"], "drop_path_rate": 0.1})
    entrants, absent = step.race(Setting("dropping", "fp32", 2, "cpu"), list(forms), 1)
    assert absent == {}
    assert [one.name for one in entrants] == list(forms)


def test_every_argument_is_in_the_row(tmp_path: Path) -> None:
    run_step(tmp_path / "rows.jsonl", "reference", models=("vit_micro_96",), pairs=1)
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["arguments"] == {
        "model": "vit_micro_96",
        "dtype": "fp32",
        "batch": 2,
        "device": "cpu",
        "pairs": 1,
        "contestants": ["reference"],
        "official": None,
        "profile": False,
        "tests": "passed",
    }


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", SMALL_PEERS)
def test_a_copy_computes_what_the_model_does(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.MODELS, name, {**SMALL_PEERS[name], "drop_path_rate": 0.5})
    torch.manual_seed(0)
    model = build(name, backend=backend)
    copied = copy_of(name, model.state_dict(), backend=backend)
    assert copied.state_dict().keys() == model.state_dict().keys()
    inputs = draw_inputs(model, 2)
    losses = []
    for one in (model, copied):
        torch.manual_seed(1)  # of stochastic depth
        losses.append(one(*inputs).item())
    assert losses[0] == losses[1]


def test_a_copy_without_a_buffer_is_refused() -> None:
    state = build("swin_micro_96").state_dict()
    del state["encoder.layers.0.blocks.1.attn_mask"]
    with pytest.raises(ValueError, match="state must hold the buffers of swin_micro_96"):
        copy_of("swin_micro_96", state)


def test_the_reference_of_a_race_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def spied(tensor: Tensor, **options: float) -> Tensor:
        drawn.append(tensor.device.type)
        return original(tensor, **options)

    drawn, original = [], torch.nn.init.trunc_normal_
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", spied)
    step.race(Setting("swin_micro_96", "fp32", 1, "cpu"), [], 1)
    once = drawn.count("cpu")
    drawn.clear()
    step.race(Setting("swin_micro_96", "fp32", 1, "cpu"), ["reference", "sdpa"], 1)
    assert 0 < drawn.count("cpu") == once


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
    entrants, absent = step.race(Setting(model, "fp32", 1, "cpu"), [contestant], 1)
    assert entrants == []
    assert absent.keys() == {contestant}
    assert not absent[contestant].startswith("Absent")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "contestant"),
    [("swin", "hf"), ("swin", "hf_sdpa"), ("swinv2", "hf"), ("vit", "hf_sdpa"), ("swin", "timm")],
)
def test_a_peer_computes_what_the_reference_does(
    name: str, contestant: str, dtype: str, monkeypatch: pytest.MonkeyPatch, peers: None
) -> None:
    monkeypatch.setitem(step.MODELS, name, SMALL_PEERS[name])
    setting = Setting(name, dtype, 2, "cpu")
    torch.manual_seed(0)
    oracle = Oracle(setting)
    peer, counterpart = trainee(contestant, setting, oracle.model)
    inputs = draw_inputs(oracle.model(), 2)
    found = findings(peer, *inputs)
    oracle.check(contestant, found, counterpart, *inputs)
    for spoilt in found.gradients:
        gradient = found.gradients[spoilt]
        rounding = 1e-2 if dtype == "bf16" and "norm" in spoilt else 1e-4  # of the whole
        if gradient.norm() > rounding * found.scalars["gradient norm"]:
            spoilt_ones = Findings(found.scalars, {**found.gradients, spoilt: -gradient})
            with pytest.raises(Disagreement, match=f"its gradient of {re.escape(spoilt)} "):
                oracle.check(contestant, spoilt_ones, counterpart, *inputs)


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


def test_gradients_are_compared_far_from_the_kink_of_l1() -> None:
    model = build("swin_micro_192", backend="reference")
    images, mask = draw_inputs(model, 2)
    with torch.no_grad():
        predicted = model.reconstruct(agreement.FAR * images.sign(), mask)
    assert (predicted - agreement.FAR * images.sign()).abs().min() > 1


def test_a_prediction_of_another_size_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose gradients are nearly the same."""

    def with_a_larger_prediction(model: SimMIM, attend: object) -> None:
        model.decoder.register_forward_hook(lambda module, inputs, out: out + 0.1 * out.detach())

    monkeypatch.setattr(trainees, "with_attention", with_a_larger_prediction)
    with pytest.raises(Disagreement, match="sdpa is wrong: its loss is"):
        step.race(Setting("swin_micro_192", "fp32", 2, "cpu"), ["sdpa"], 1)
