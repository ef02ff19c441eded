"""docs/benchmarks.md from the CSV files: results, how they were measured, and plots.

No number of the page is written by hand.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hf_segformer import SegFormerConfig
from hf_segformer.benchmarking.cost import model_info
from hf_segformer.benchmarking.timing import QUIET

from . import compiled, exports, inference, labels, large_images, predict, profile, serving, training
from .comparisons import COMPARISONS, COMPILED, OURS, STOCK, Results, Row
from .machine import ROOT
from .record import RESULTS, Record, read_records

PAGE = ROOT / "docs" / "benchmarks.md"
SCRIPTS = {
    name: module.ROWS
    for name, module in (
        ("inference", inference),
        ("compiled", compiled),
        ("training", training),
        ("labels", labels),
        ("predict", predict),
        ("large_images", large_images),
        ("profile", profile),
        ("exports", exports),
        ("serving", serving),
    )
}


def read_results(folder: Path) -> Results:
    """Return the records of one processor's folder by script, row and candidate."""
    results: Results = {}
    for script in SCRIPTS:
        for record in read_records(folder / f"{script}.csv"):
            results.setdefault(script, {}).setdefault(record.row, {})[record.candidate] = record
    return results


def read_processors(folder: Path) -> dict[Path, Results]:
    """Return the records of every processor by its folder; raises ValueError if there are none."""
    found = {each: read_results(each) for each in sorted(folder.iterdir()) if each.is_dir()} if folder.is_dir() else {}
    if not any(found.values()):
        raise ValueError(f"{folder} has no measurements; `make bench` makes them")
    return {each: results for each, results in found.items() if results}


def name_of(results: Results) -> str:
    """Return the name of the processor, or of the graphics card, that a folder's records were measured on."""
    first = _records(results)[0]
    return f"{first.processor}, {first.instructions}, {first.cores} cores"


def instructions_of(results: Results) -> str:
    """Return the instruction set that a folder's records were measured with."""
    return _records(results)[0].instructions


def _records(results: Results) -> list[Record]:
    return [record for rows in results.values() for row in rows.values() for record in row.values()]


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def side_by_side(processors: Iterable[Results]) -> str:
    """Return how many times as fast each comparison came out, with a column for each processor."""
    columns = list(processors)
    lines = []
    for comparison in COMPARISONS.values():
        speeds = [comparison.speed(results) for results in columns]
        if any(speeds):
            lines.append((comparison.work, *("" if speed is None else f"{speed:.2f}x" for speed in speeds)))
    return table(("times as fast", *map(name_of, columns)), lines)


def result_table(results: Results) -> str:
    """Return time and memory of each comparison on one processor, here and there."""
    lines = []
    for comparison in COMPARISONS.values():
        mine, other = comparison.milliseconds(results)
        if mine is None or other is None:
            continue
        share = comparison.memory(results)
        is_disturbed = any(each.quiet is False for each in comparison.records(results).values())
        lines.append(
            (
                comparison.work + (" (machine disturbed)" if is_disturbed else ""),
                _number(mine),
                _number(other),
                f"{other / mine:.2f}x",
                "" if share is None else f"{share:.0%}",
            )
        )
    return table(("work", "here, ms", "others, ms", "times as fast", "of the memory"), lines)


def record_table(rows: dict[str, Row]) -> str:
    """Return every record of a script."""
    lines = [
        (
            row,
            each.candidate,
            _number(each.milliseconds),
            f"{_number(each.fastest)} to {_number(each.slowest)}" if each.samples else "",
            str(each.samples or ""),
            _number(each.mebibytes, 0),
            "" if each.difference is None else f"{each.difference:.0e}",
            each.note or ("" if each.first_call is None else f"first call {each.first_call:.1f} s"),
        )
        for row, records in rows.items()
        for each in records.values()
    ]
    return table(("row", "candidate", "ms", "from, to", "samples", "MiB", "difference", ""), lines)


def record_sections(results: Results, link: str) -> str:
    """Return all records of a processor, by file."""
    return "\n\n".join(
        f"#### {script}\n\n[{script}.csv]({link}/{script}.csv)\n\n{record_table(rows)}"
        for script, rows in results.items()
    )


def _number(number: float | None, digits: int = 1) -> str:
    return "" if number is None else f"{number:,.{digits}f}"


def machine_table(results: Results) -> str:
    """Return machines, versions and commits of the rows."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for script, rows in results.items():
        for row, records in rows.items():
            each = next(iter(records.values()))
            versions = f"Python {each.python}, torch {each.torch}, transformers {each.transformers}"
            place = f"{each.caches}, {each.gibibytes} GiB, {each.system}".removeprefix(", ")
            key = (place, each.device, str(each.threads), f"{versions} {each.runtimes}".strip(), each.commit, each.date)
            seen.setdefault(key, []).append(f"{script} {row}")
    everything = sum(len(rows) for rows in results.values())
    lines = [(*key, "all" if len(rows) == everything else ", ".join(rows)) for key, rows in seen.items()]
    return table(("machine", "device", "threads", "versions", "commit", "date", "rows"), lines)


def attention_table() -> str:
    """Return B0's multiply-adds by image size, computed from the configuration as `segformer info` does."""
    config, lines = SegFormerConfig.from_variant("b0", num_labels=150), []
    for side in inference.SIDES:
        rows = model_info(config, side, side)
        stages = list(zip(rows[:-1], config.depths, strict=True))
        attention = sum(
            2 * depth * stage.num_tokens * stage.num_reduced_tokens * stage.num_channels for stage, depth in stages
        )
        total = sum(row.num_multiply_adds for row in rows)
        first = rows[0]
        lines.append(
            (
                f"{side}x{side}",
                f"{first.num_tokens:,}",
                f"{first.num_reduced_tokens:,}",
                f"{total / side**2:,.0f}",
                f"{attention / side**2:,.0f}",
                f"{attention / total:.0%}",
            )
        )
    titles = ("image", "tokens N", "reduced N/R", "multiply-adds a pixel", "of them N²/R", "share")
    return table(titles, lines)


def size_rows(results: Results) -> dict[int, Row]:
    """Return the rows of B0 at square images that were measured, by side."""
    rows = results.get("inference", {})
    return {side: rows[name] for side, name in inference.SIDES.items() if {OURS, STOCK} <= rows.get(name, {}).keys()}


def size_table(rows: dict[int, Row]) -> str:
    """Return the cost of a pixel, here and in Transformers."""
    lines = []
    for side, records in rows.items():
        cells = [f"{side}x{side}"]
        for candidate in (OURS, STOCK):
            each = records[candidate]
            cells += [_number(1e6 * each.milliseconds / side**2), _bytes(each, side**2)]
        lines.append(cells)
    titles = ("image", "ns a pixel", "bytes a pixel", "Transformers: ns a pixel", "bytes a pixel")
    return table(titles, lines)


def profile_table(rows: dict[str, Row]) -> str:
    """Return the share of each kind of operation in a call, in the order of the first row."""
    totals = {name: sum(each.milliseconds for each in records.values()) for name, records in rows.items()}
    kinds = dict.fromkeys(kind for records in rows.values() for kind in records)
    lines = [
        (
            kind,
            *(
                f"{records[kind].milliseconds / totals[name]:.0%}" if kind in records else ""
                for name, records in rows.items()
            ),
        )
        for kind in kinds
    ]
    lines.append(("together, one thread", *(f"{total:,.0f} ms" for total in totals.values())))
    return table(("operations", *rows), lines)


def _bytes(record: Record, num_pixels: int) -> str:
    return "not known" if record.mebibytes is None else _number(record.mebibytes * 2**20 / num_pixels, 0)


def growth(rows: dict[int, Row]) -> str:
    """Return a sentence on time against size."""
    if len(rows) < 2:
        return ""
    (small, first), *_, (large, last) = rows.items()
    ratios = [last[name].milliseconds / first[name].milliseconds for name in (OURS, STOCK)]
    return (
        f"From {small}x{small} to {large}x{large}, {(large / small) ** 2:.0f} times the pixels, this package took "
        f"{ratios[0]:.0f} times as long and Transformers {ratios[1]:.0f} times."
    )


def large_table(rows: dict[str, Row]) -> str:
    """Return time and peak of a process by the size of the image (width x height)."""
    lines = [
        (
            row,
            each.candidate,
            f"{each.milliseconds / 1000:,.0f} s",
            "not known" if each.mebibytes is None else f"{each.mebibytes:,.0f} MiB",
            each.note,
        )
        for row, records in rows.items()
        for each in records.values()
        if row != "agreement"
    ]
    return table(("image", "tiles", "time", "peak of the process", ""), lines)


def agreement_table(rows: dict[str, Row]) -> str:
    """Return the agreement of tiled prediction with that of the whole image."""
    lines = [
        (each.candidate, f"{1 - each.difference:.1%}", each.note, f"{each.milliseconds / 1000:,.1f} s")
        for each in rows["agreement"].values()
    ]
    return table(("tiles", "same label as the whole image", "", "time"), lines)


def first_calls(rows: dict[str, Row]) -> str:
    """Return a sentence on the time of compiling."""
    parts = [
        f"{row.upper()} {each.first_call:.0f} s ({each.candidate.removeprefix('hf_segformer ')})"
        for row, records in rows.items()
        for each in records.values()
        if each.first_call is not None and each.candidate in COMPILED
    ]
    return f"The first call compiles: {', '.join(parts)}." if parts else ""


def write_page(page: Path, folder: Path) -> None:
    """Write the page from the folders of all processors, and plots beside them; raises ValueError if there are none."""
    processors = read_processors(folder)
    from .plots import draw_ratios, draw_sizes  # matplotlib, which only the page needs

    names = [name_of(results) for results in processors.values()]
    shown = [each for each in COMPARISONS.values() if each.others == (STOCK,)]
    plots = []
    for name, title in (("speed", "Times as fast as Transformers"), ("memory", "Share of Transformers' memory")):
        figures = {each.work: [getattr(each, name)(results) for results in processors.values()] for each in shown}
        if bars := {work: ratios for work, ratios in figures.items() if any(ratios)}:
            draw_ratios(bars, names, folder / f"{name}.png", title)
            plots.append(f"![{title}]({{folder}}/{name}.png)")
    for each, results in processors.items():
        if rows := size_rows(results):
            draw_sizes(rows, each / "sizes.png")
    link = Path("..") / folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    disturbed = [each.quiet is False for results in processors.values() for each in _records(results)]
    text = _PAGE.format(
        processors="\n".join(f"- {name}" for name in names),
        side_by_side=side_by_side(processors.values()),
        quiet=f"{QUIET:.0%}",
        segmentation_mebibytes=math.prod(labels.SIZE) * torch.int64.itemsize // 2**20,
        disturbed=f"{statistics.fmean(disturbed):.0%}",
        attention=attention_table(),
        plots="\n\n".join(plots).format(folder=link),
        sections="\n\n".join(processor_section(results, f"{link}/{each.name}") for each, results in processors.items()),
    )
    page.write_text(text)


def processor_section(results: Results, link: str) -> str:
    """Return what was measured on one processor; `link` leads to its folder."""
    parts = [f"## {name_of(results)}", result_table(results), f"### Where and when\n\n{machine_table(results)}"]
    if sentence := first_calls(results.get("compiled", {})):
        parts.append(sentence)
    if "profile" in results:
        parts.append(f"### Where the time goes\n\n{profile_table(results['profile'])}")
    if rows := size_rows(results):
        plot = f"![Time and memory of a pixel against the side of the image]({link}/sizes.png)"
        parts.append(f"### Cost against size\n\n{plot}\n\n{size_table(rows)}\n\n{growth(rows)}".rstrip())
    if large := results.get("large_images"):
        parts.append("### Images larger than memory")
        if large.keys() - {"agreement"}:
            parts.append(large_table(large))
        if "agreement" in large:
            parts.append(agreement_table(large))
    return "\n\n".join([*parts, f"### All records\n\n{record_sections(results, link)}"])


_PAGE = """# Speed and memory

`make bench` repeats these measurements and writes this page; no number is written by hand. `segformer bench` prints a
table for your own machine, model and sizes.

This package against Transformers' SegFormer with the same weights, eager, 150 classes, float32, unless a line says
otherwise. Memory is this package's peak as a share of the other's. Each processor has its own rows, none replaces
another's, and `make bench` on a new one adds a column. A "limited" one has wider instructions, which PyTorch, oneDNN
and MKL were not allowed to use; it stands in for processors that were not at hand. Measured on:

{processors}

{side_by_side}

{plots}

## How it is measured

- **Equal results.** Each row first compares results: logits, segmentation maps, or loss and gradient without dropout,
  with LayerNorm's epsilon at 1e-5 in both. Where they differ there is no number. BatchNorm has random statistics, so
  that a missing norm would be noticed.
- **Interleaved.** Samples of the candidates alternate in one process, and the median of each counts. A round during
  which other processes used more than {quiet} of the machine is measured again. Rows where that did not help are
  marked: here {disturbed} of the records.
- **Memory** is the growth of the process's peak (VmHWM) during one call, in a fresh process for each candidate, after a
  warm-up call and after the allocator has returned what it keeps. Weights and inputs are not counted; results and
  gradients are. It is known on Linux only. ONNX Runtime and OpenVINO keep their memory between calls, so theirs cannot
  be measured this way.
- **Equal threads.** ONNX Runtime's idle threads sleep instead of spinning, OpenVINO has the latency hint and float32,
  and there is a pause before each sample.
- **The peak** is the rate of the fastest product of square matrices, of three sizes and by MKL or oneDNN, interleaved
  with the networks. The network's operations are those that `segformer info` counts, with the decode head folded.
- **Logits to labels**: "scene" has logits that change slowly, "noise" has another best class at every pixel, the worst
  case. The result, int64 as in Transformers, takes {segmentation_mebibytes} MiB, which no implementation can avoid.
- **Images**: a folder to segmentation maps, files read each time, by `SegFormerPredictor` and by Transformers' pipeline
  "image-segmentation" with its own SegFormer.
- **A busy core** is another process that computes all the time, on one of two cores.

```sh
make bench                              # all rows except folders and large images
make bench-large                        # folders and large images
python -m benchmarks --missing          # only rows that were not measured at this commit
python -m benchmarks.inference b0       # one row
python -m benchmarks.report             # this page only
python -m benchmarks.goals              # the goals in benchmarks/goals.py
```

A row is replaced as a whole, and never by one that failed, or that was disturbed where the old one was not.

## What the sections below show

**Where the time goes**: each operation's own time, in one thread. Matrix products (attention's included) and
convolutions run at the speed of PyTorch's libraries; what a better implementation can save is in the other lines:
passes over memory for norms, activations, sums and copies, and Python's time to launch operations.

**Cost against size**: convolutions, projections, the Mix-FFN and the decode head cost the same for every pixel.
Attention does not: N tokens attend to N/R others, where R is the square of the reduction (64, 16, 4 and 1 in the four
stages), so its products grow as N²/R. For B0, computed as in `segformer info` (N and N/R of the first stage, products
of all):

{attention}

Attention maps are never stored as a whole, so the peak of a forward pass grows with the number of pixels.

**Images larger than memory**: `predict_large_image` with a B0 of 6 classes, from a compressed GeoTIFF to a compressed
GeoTIFF. The peak is that of the whole process, including Python, PyTorch and weights. Sizes are width x height;
30000x2000 is the top of an image of 30,000 x 30,000. A second table has the network trained on CamVid on a drawn street
of 1920x704 pixels, tiled and whole. Attention sees a whole tile, so even far from every seam the prediction depends on
the tile. (A network without attention gives the same logits up to rounding, 128 pixels from a seam:
tests/inference/test_tiling.py.)

**All records**: "difference" is the difference from the first candidate relative to the largest value; for labels, the
share of pixels.

{sections}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the processors' folders, and of the plots"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write")
    arguments = parser.parse_args(argv)
    try:
        write_page(arguments.page, arguments.results)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"written to {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
