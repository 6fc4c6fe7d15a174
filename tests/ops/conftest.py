"""Fixtures for the tests of every op."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from simmim_fast import _native
from simmim_fast._backends import TRITON_INTERPRETED
from tests import host_cuda
from tests.ops.targets import TARGETS, Target

# "few" examples are the same in every run; `make fuzz` draws "many". A fixture of a function's scope, which hypothesis
# warns of, holds nothing here that an example changes.
for _profile, _examples, _same in (("few", 25, True), ("many", 500, False)):
    settings.register_profile(
        _profile,
        max_examples=_examples,
        derandomize=_same,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("few")


# Kernels that the collected tests compile offline, whether they are run or not: of fast and of slow ones.
COMPILATIONS = pytest.StashKey[dict[bool, int]]()


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter needs a process of its own; test_triton_interpreter.py starts it, and first: it takes longest."""
    config.stash[COMPILATIONS] = compilations(items)
    items.sort(key=lambda item: item.path.name != "test_triton_interpreter.py")
    left_out = {item for item in items if not takes_its_dtypes(item)}
    if not TRITON_INTERPRETED:
        left_out |= {item for item in items if item.get_closest_marker("interpreted")}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


def compilations(items: list[pytest.Item]) -> dict[bool, int]:
    """By whether a test is slow, how many kernels such tests compile offline by their marks."""
    counts = {False: 0, True: 0}
    for item in items:
        if mark := item.get_closest_marker("compiles"):
            counts[item.get_closest_marker("slow") is not None] += mark.args[0]
    return counts


def takes_its_dtypes(item: pytest.Item) -> bool:
    """Whether a test's target takes the dtypes that parametrise it, or that its mark says."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    marked = [torch.float64] if item.get_closest_marker("float64") else []
    target = parameters.get("target")
    return not isinstance(target, Target) or target.takes(*parameters.values(), *marked)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A backend that can run here. What is not compiled fails, since these tests would otherwise prove nothing."""
    target: Target = request.param
    if target.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("not run: PyTorch sees no CUDA device")
    if target.cuda_on_host:
        if host_cuda.WHY_NOT is not None:
            pytest.fail(f"cuda-on-host is off: {host_cuda.WHY_NOT}")
        with host_cuda.installed():
            yield target
        return
    if target.backend == "native" and (reason := _native.why_not(target.device)) is not None:
        pytest.fail(f"native is off on {target.device}: {reason}")
    yield target


@pytest.fixture(autouse=True)
def counted_compilations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test compiles no more kernels offline than it is marked with; test_offline_budget.py adds the marks up."""
    marker = request.node.get_closest_marker("compiles")
    if marker is None and "triton" not in sys.modules:
        yield
        return
    from simmim_fast.testing import offline

    allowed, original, compiled = marker.args[0] if marker else 0, offline.compile_launch, []

    def counted(*args: Any) -> Any:
        compiled.append(args)
        assert len(compiled) <= allowed, f"marked with {allowed} offline compilations, and makes more"
        return original(*args)

    monkeypatch.setattr(offline, "compile_launch", counted)
    yield


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that PyTorch hands out is NaN, for C++ as for Python, so that what a kernel leaves unwritten shows.

    Not under compute-sanitizer, whose initcheck would take it for initialised.
    """
    if request.node.get_closest_marker("sanitize"):
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
