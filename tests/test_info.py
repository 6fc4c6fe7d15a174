from __future__ import annotations

import itertools
import json

import pytest
import torch

from simmim_fast import _backends, _native
from simmim_fast._backends import BACKENDS
from simmim_fast.info import collect, render
from simmim_fast.ops import OPS


def test_facts_are_json() -> None:
    assert json.loads(json.dumps(collect())) == collect()


def test_versions() -> None:
    versions = collect()["versions"]
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"simmim_fast", "python", "torch", "triton", "cuda", "driver"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_every_backend_of_every_op_is_used_ready_or_off_for_a_reason(op: str, device: str) -> None:
    backends = collect()["ops"][op][device]
    assert set(backends["off"]) <= set(BACKENDS)
    assert all(backends["off"].values())
    assert backends["use"] not in backends["off"]
    if device == "cuda" and not torch.cuda.is_available():
        assert backends["use"] is None
        assert backends["error"] == "PyTorch sees no CUDA device"
        assert set(backends["off"]) == {"native", "triton"}


def test_says_why_native_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "why_not", lambda device: f"not compiled for {device}")
    facts = collect()
    for name, op in OPS.items():
        for device in ("cpu", "cuda"):
            reason = f"not compiled for {device}" if device in op.native_devices else "there is no CUDA C++ for this op"
            assert facts["ops"][name][device]["off"]["native"] == reason
    assert "native is off: not compiled for cpu" in render(facts)


def test_says_what_float64_gets_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
    assert "cuda: triton (float64: reference)" in render(collect() | {"gpus": []})
    assert collect()["ops"]["bias_gelu"]["cuda"]["float64"] == "reference"


def test_says_what_the_variable_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMMIM_FAST_BACKEND", "nativ")
    facts = collect()
    assert facts["environment"]["SIMMIM_FAST_BACKEND"] == "nativ"
    assert all(devices["cpu"]["use"] is None for devices in facts["ops"].values())
    assert "did you mean 'native'?" in render(facts)


def test_a_variable_that_cannot_be_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = collect()["ops"]
    monkeypatch.setenv("SIMMIM_FAST_BACKEND", "triton")
    for name, devices in collect()["ops"].items():
        assert devices["cpu"]["use"] is None
        assert "SIMMIM_FAST_BACKEND='triton' cannot run here" in devices["cpu"]["error"]
        assert devices["cpu"]["off"] == before[name]["cpu"]["off"]


@pytest.mark.parametrize("op", ["shifted_window_attention", "biased_attention"])
def test_says_that_attention_dropout_runs_the_reference(op: str) -> None:
    lines = render(collect()).splitlines()
    after = lines[lines.index(f"  {op}") + 1 :]
    own = itertools.takewhile(lambda line: line.startswith("    "), after)
    limit = "no kernel drops attention weights: in training, models with attention dropout above 0 run the reference"
    assert f"    limit: {limit}" in own


def test_text_names_every_fact() -> None:
    facts = collect()
    text = render(facts)
    for section in ("versions", "native", "environment", "ops"):
        assert all(f"  {name}" in text for name in facts[section])
