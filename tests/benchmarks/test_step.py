"""The step benchmark: its command line on small models, its arithmetic, and that a wrong contestant gets no speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import step, trainees
from benchmarks.contestants import Absent
from benchmarks.models import build, draw_inputs
from benchmarks.results import read_rows
from benchmarks.trainees import Trainee, trainee, with_sdpa
from simmim_fast import create_model
from simmim_fast.models import SimMIM
from simmim_fast.testing import relative_error

MICRO = ("swin_micro_96", "vit_micro_96")


def run_step(results: Path, *contestants: str) -> None:
    options = ["--device", "cpu", "--models", *MICRO, "--dtype", "fp32", "--batch", "2", "--pairs", "3"]
    step.main([*options, "--contestants", *contestants, "--results", str(results)])


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
    def doubled(model: SimMIM) -> SimMIM:
        torch.nn.init.constant_(model.decoder[0].bias, 1.0)
        return model

    monkeypatch.setitem(trainees._CONTESTANTS, "sdpa", ("reference", doubled, None))
    with pytest.raises(SystemExit, match="sdpa is wrong: its loss is"):
        run_step(tmp_path / "rows.jsonl", "reference", "sdpa")
    assert not (tmp_path / "rows.jsonl").exists()
    assert "images/s" not in capsys.readouterr().out


def test_rates_and_ratios() -> None:
    fast, slow = (
        step.Entrant(name, trainee=None, seconds=seconds)
        for name, seconds in (("fast", [1.0, 2.0, 4.0]), ("slow", [3.0, 2.0, 8.0]))
    )
    first, second = step.results([fast, slow], batch=8)
    assert first["images_per_second"]["median"] == 4
    assert first["times_faster_than"] == {"slow": 2}
    assert second["times_faster_than"] == {"fast": 0.5}
    assert first["peak_bytes"] is None


@pytest.mark.parametrize("name", MICRO)
def test_the_reference_with_sdpa_is_the_reference(name: str) -> None:
    torch.manual_seed(0)
    state = build(name, backend="reference").state_dict()
    plain, fused = (trainee(contestant, name, "fp32", "cpu", state) for contestant in ("reference", "sdpa"))
    inputs = draw_inputs(plain.model, 2)
    for one in (plain, fused):
        one.gradients(*inputs)
    for (key, expected), actual in zip(plain.model.named_parameters(), fused.model.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) < 1e-4, key


def test_cosine_attention_has_no_sdpa() -> None:
    model = create_model("swinv2", img_size=64, embed_dim=8, depths=(2,), num_heads=(1,), window_size=8)
    with pytest.raises(Absent, match="cosine attention"):
        with_sdpa(model)


def test_stochastic_depth_is_noticed() -> None:
    rates = {0.0: False, 0.5: True}
    for rate, expected in rates.items():
        assert Trainee(build("swin_micro_96", drop_path_rate=rate), "fp32").draws is expected
