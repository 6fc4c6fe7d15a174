"""The memory traffic of a training step, and the time that it costs a GPU at least.

    python -m benchmarks.traffic --model swin_base_192 --backend reference
    python -m benchmarks.traffic --all benchmarks/results/traffic.jsonl    # what docs/traffic.md is made of

Forward and backward of a model, counted on a CPU's dispatcher without computing anything; see benchmarks/counting.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counting import Traffic, count, hollow, no_data
from benchmarks.models import MODELS, build, loss_of, model_name
from benchmarks.official import build_official
from benchmarks.results import begin, write_row
from simmim_fast import _native
from simmim_fast.models.recompute import RECOMPUTE

PEAK_TFLOPS = 790.0  # bf16 products and memory of an H200, as it reaches them
BANDWIDTH_TBS = 4.3
# Command lines of the rows of docs/traffic.md; of the official code's, which need its checkout, too.
_BOTH = ("swin_base_192", "vit_base_224")
_OTHERS = ("swinv2_base_192", "swin_large_192")
PLAN = (
    *(f"--model {model} --backend reference --batch {batch}" for model in _BOTH for batch in (16, 8)),
    *(f"--model {model} --backend reference" for model in _OTHERS),
    *(
        f"--model {model} --batch {batch} --recompute {recompute}"
        for model in _BOTH
        for batch in (16, 8)
        for recompute in RECOMPUTE
    ),
    *(f"--model {model}" for model in _OTHERS),
    *(f"--model vit_base_224 --backend {backend} --drop-path-rate 0" for backend in ("reference", "auto")),
)
OFFICIAL_PLAN = (*(f"--model {model}" for model in _BOTH), "--model vit_base_224 --drop-path-rate 0")
COLUMNS = f"{'calls':>6} {'launches':>9} {'GFLOP':>10} {'MB':>10} {'fixed MB':>10} {'MB/image':>9} {'ms':>9}"


def count_model(
    model: nn.Module, batches: Iterable[int], dtype: str, mask_dtype: torch.dtype = torch.bool
) -> list[Traffic]:
    """What one forward and backward of a SimMIM does.

    Args:
        model: Called as `model(images, mask)`, returns the loss; has `in_chans`, `patch_size` and `img_size` (H, W).
            It loses its parameters' values, and may be on the meta device.
        batches: Images in a step, a count for each.
        dtype: "bf16", under autocast, or "fp32".
        mask_dtype: Of the mask.
    """
    traffic = []
    with no_data():
        hollow(model)
        for batch in batches:
            images = torch.empty(batch, model.in_chans, *model.img_size)
            mask = torch.empty(batch, *(side // model.patch_size for side in model.img_size), dtype=mask_dtype)
            model.zero_grad()
            step = partial(_train, model, images, mask, dtype)
            traffic.append(count(step, kept=model.parameters()))
    return traffic


def _train(model: nn.Module, images: Tensor, mask: Tensor, dtype: str) -> None:
    loss_of(model, images, mask, dtype).backward()


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.traffic", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=model_name, choices=MODELS, default="swin_base_192", help="with or without `simmim_` before it")
    add("--backend", choices=("auto", "reference", "native"), default="auto", help="of the ops on a CPU")
    add("--batch", type=int, default=16, help="images in a step (default: 16)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16, which is autocast (default), or fp32")
    add("--drop-path-rate", type=float, help="rate of stochastic depth (default: the model's)")
    add("--recompute", choices=RECOMPUTE, help="what the backward of ours computes again (default: pointwise)")
    add("--peak-tflops", type=float, default=PEAK_TFLOPS, help=f"matrix products of the GPU (default: {PEAK_TFLOPS:g})")
    add("--bandwidth-tbs", type=float, default=BANDWIDTH_TBS, help=f"memory of the GPU (default: {BANDWIDTH_TBS:g})")
    add("--official", metavar="PATH", help="count the official code of a checkout of microsoft/SimMIM instead of ours")
    add("--json", metavar="FILE", type=Path, help="append a row to this file of JSON lines")
    add("--all", metavar="FILE", type=Path, help="count all rows of docs/traffic.md again and put them into this file")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.official is not None:
        options.backend = "official"
    if (options.backend == "auto" or options.all) and (reason := _native.why_not("cpu")) is not None:
        parser.error(f"--backend auto would count the reference here, as the compiled library is off: {reason}")
    if options.backend in ("auto", "native"):
        options.recompute = options.recompute or "pointwise"
    elif options.recompute is not None:
        parser.error(f"--recompute must be left out for plain PyTorch, which saves everything, got {options.recompute}")
    return options


def _build(options: argparse.Namespace) -> nn.Module:
    named = {"drop_path_rate": options.drop_path_rate, "recompute": options.recompute}
    overrides = {name: value for name, value in named.items() if value is not None}
    if options.official is not None:
        return build_official(options.official, options.model, **overrides)  # it reads values while it is built
    with torch.device("meta"):
        return build(options.model, backend=options.backend, **overrides)


def count_row(options: argparse.Namespace) -> dict[str, Any]:
    """The row of what the options name, printed as well."""
    mask_dtype = torch.bool if options.official is None else torch.int64  # as data/data_simmim.py makes it
    one, two = count_model(_build(options), (options.batch, 2 * options.batch), options.dtype, mask_dtype)
    limits = (options.batch, options.peak_tflops * 1e12, options.bandwidth_tbs * 1e12)
    facts = summary(one, two, *limits)
    again = "" if options.recompute is None else f", computes again: {options.recompute}"
    how = f"backend {options.backend}, {options.dtype}, batch {options.batch}{again}"
    print(f"{options.model}, {how}: forward and backward")
    print(*table(one, two, *limits), *closing(facts, *limits), sep="\n", flush=True)
    given = {name: value for name, value in vars(options).items() if name not in ("json", "official", "all")}
    ops = {op: summary(one.of(op), two.of(op), *limits) for op in dict.fromkeys(call.op for call in one.calls)}
    return {"benchmark": "traffic", "arguments": given, **facts, "ops": ops}


def recount(path: Path, official: str | None = None) -> None:
    """Count all of `PLAN` again, and put the rows in the place of those of a file: older counts say nothing more.

    Args:
        path: The file of JSON lines; left as it was where a count fails.
        official: Checkout of microsoft/SimMIM; without one the file's rows of its code stay.
    """
    commands = [line.split() for line in PLAN]
    commands += [[*line.split(), "--official", official] for line in OFFICIAL_PLAN if official is not None]
    stored = path.read_text("utf-8").splitlines(keepends=True) if official is None and path.exists() else []
    kept = [line for line in stored if json.loads(line)["arguments"]["backend"] == "official"]
    fresh = path.with_suffix(".recounted")
    try:
        fresh.write_text("".join(kept), encoding="utf-8")
        for command in commands:
            write_row(fresh, count_row(parse(command)))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Count, print and, where asked, write a row or all."""
    options = parse(arguments)
    begin()
    if options.all is not None:
        recount(options.all, options.official)
        return
    row = count_row(options)
    if options.json is not None:
        write_row(options.json, row)


if __name__ == "__main__":
    main()
