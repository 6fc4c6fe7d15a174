"""The memory traffic of a training step, and the time that it costs a GPU at least.

    python -m benchmarks.traffic --model swin_base_192 --backend reference

Forward and backward of a model, counted on a CPU's dispatcher without computing anything; see benchmarks/counting.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.counting import Traffic, count, hollow, no_data
from benchmarks.models import MODELS, build, loss_of, model_name
from benchmarks.results import write_row
from simmim_fast import _native

PEAK_TFLOPS = 790.0  # bf16 products and memory of an H200, as it reaches them
BANDWIDTH_TBS = 4.3
COLUMNS = f"{'calls':>6} {'launches':>9} {'GFLOP':>10} {'MB':>10} {'fixed MB':>10} {'MB/image':>9} {'ms':>9}"


def count_model(name: str, batch: int, dtype: str, **overrides: object) -> Traffic:
    """What one forward and backward of a model of `benchmarks.models` does.

    Args:
        name: Key of `MODELS`.
        batch: Images.
        dtype: "bf16", under autocast, or "fp32".
        **overrides: Arguments of the model that replace its own.
    """
    with no_data():
        model = hollow(lambda: build(name, **overrides))
        images = torch.empty(batch, model.in_chans, *model.img_size)
        mask = torch.empty(batch, *(side // model.patch_size for side in model.img_size), dtype=torch.bool)
        return count(lambda: loss_of(model, images, mask, dtype).backward(), kept=model.parameters())


def parts(small: int, large: int, batch: int) -> tuple[float, float]:
    """(fixed part, part of an image) of a quantity that was counted at `batch` images and at twice as many."""
    image = (large - small) / batch
    return small - batch * image, image


def summary(one: Traffic, two: Traffic, batch: int, peak: float, bandwidth: float) -> dict[str, Any]:
    """What `one`, a step of `batch` images, does, as JSON has it; `two` is a step of twice as many.

    Args:
        one: Counted at `batch` images.
        two: Counted at twice as many, which tells the fixed part from that of an image.
        batch: Images.
        peak: FLOP/s of the GPU.
        bandwidth: Bytes/s of the GPU.
    """
    fixed, image = parts(one.nbytes, two.nbytes, batch)
    saved_fixed, saved_image = parts(one.saved, two.saved, batch)
    return {
        "calls": len(one.calls),
        "launches": one.launches,
        "flops": one.flops,
        "bytes": one.nbytes,
        "bytes_fixed": fixed,
        "bytes_per_image": image,
        "saved_bytes": one.saved,
        "saved_bytes_fixed": saved_fixed,
        "saved_bytes_per_image": saved_image,
        "lower_bound_seconds": one.seconds(peak, bandwidth),
    }


def table(one: Traffic, two: Traffic, batch: int, peak: float, bandwidth: float) -> Iterator[str]:
    """Lines of text: an operator each, those that move most first, and their sum."""
    names = sorted({call.op for call in one.calls}, key=lambda op: -one.of(op).nbytes)
    width = max(map(len, names))
    yield f"{'operator':<{width}} {COLUMNS}"
    for name, facts in (
        *((op, summary(one.of(op), two.of(op), batch, peak, bandwidth)) for op in names),
        ("total", summary(one, two, batch, peak, bandwidth)),
    ):
        yield (
            f"{name:<{width}} {facts['calls']:>6} {facts['launches']:>9} {facts['flops'] / 1e9:>10.1f}"
            f" {facts['bytes'] / 1e6:>10.1f} {facts['bytes_fixed'] / 1e6:>10.1f}"
            f" {facts['bytes_per_image'] / 1e6:>9.2f} {facts['lower_bound_seconds'] * 1e3:>9.3f}"
        )


def closing(facts: dict[str, Any], batch: int, peak: float, bandwidth: float) -> Iterator[str]:
    """The lines under the table."""
    megabytes = {name: value / 1e6 for name, value in facts.items() if "bytes" in name}
    seconds = facts["lower_bound_seconds"]
    yield (
        f"per image-step at batch {batch}: {megabytes['bytes'] / batch:,.1f} MB in {facts['calls']:,} calls a step"
        f" ({megabytes['bytes_fixed']:,.1f} MB a step + {megabytes['bytes_per_image']:,.1f} MB an image),"
        f" {facts['flops'] / batch / 1e9:,.1f} GFLOP"
    )
    yield (
        f"saved for backward at batch {batch}: {megabytes['saved_bytes'] / batch:,.1f} MB an image"
        f" ({megabytes['saved_bytes_fixed']:,.1f} MB a step + {megabytes['saved_bytes_per_image']:,.1f} MB an image)"
    )
    yield (
        f"lower bound, not a measurement: a GPU of {peak / 1e12:g} TFLOP/s and {bandwidth / 1e12:g} TB/s needs at least"
        f" {seconds * 1e3:,.2f} ms for it, {batch / seconds:,.0f} images/s at most, optimizer and clipping left out"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.traffic", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=model_name, choices=MODELS, default="swin_base_192", help="with or without `simmim_` before it")
    add("--backend", choices=("auto", "reference", "native"), default="auto", help="of the ops on a CPU")
    add("--batch", type=int, default=16, help="images in a step (default: 16)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16, which is autocast (default), or fp32")
    add("--drop-path-rate", type=float, help="rate of stochastic depth (default: the model's)")
    add("--peak-tflops", type=float, default=PEAK_TFLOPS, help=f"matrix products of the GPU (default: {PEAK_TFLOPS:g})")
    add("--bandwidth-tbs", type=float, default=BANDWIDTH_TBS, help=f"memory of the GPU (default: {BANDWIDTH_TBS:g})")
    add("--json", metavar="FILE", help="append a row to this file of JSON lines")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.backend == "auto" and (reason := _native.why_not("cpu")) is not None:
        parser.error(f"--backend auto would count the reference here, as the compiled library is off: {reason}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Count, print and, where asked, write a row."""
    options = parse(arguments)
    overrides = {"backend": options.backend}
    if options.drop_path_rate is not None:
        overrides["drop_path_rate"] = options.drop_path_rate
    one, two = (count_model(options.model, n, options.dtype, **overrides) for n in (options.batch, 2 * options.batch))
    limits = (options.batch, options.peak_tflops * 1e12, options.bandwidth_tbs * 1e12)
    facts = summary(one, two, *limits)
    print(f"{options.model}, backend {options.backend}, {options.dtype}, batch {options.batch}: forward and backward")
    print(*table(one, two, *limits), *closing(facts, *limits), sep="\n")
    if options.json is not None:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        ops = {op: summary(one.of(op), two.of(op), *limits) for op in dict.fromkeys(call.op for call in one.calls)}
        write_row(options.json, {"benchmark": "traffic", "arguments": given, **facts, "ops": ops})


if __name__ == "__main__":
    main()
