"""residual_layer_norm against what else computes it, at the shapes of the released models."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.contest import contest, contestants, time_forward, time_host, time_training

OP = "residual_layer_norm"


@contest(OP)
def test_forward(benchmark: BenchmarkFixture, name: str, case: Case, dtype: str, device: str) -> None:
    time_forward(benchmark, name, case, dtype, device)


@contest(OP)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, case: Case, dtype: str, device: str) -> None:
    time_training(benchmark, name, case, dtype, device)


@contestants(OP)
def test_host_overhead(benchmark: BenchmarkFixture, name: str, device: str) -> None:
    time_host(benchmark, OP, name, device)
