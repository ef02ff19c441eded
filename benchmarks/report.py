"""docs/benchmarks.md from the CSV files: goals, what was reached, how it was measured, and pictures of it.

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

from . import bfloat16, compiled, exports, inference, labels, large_images, predict, profile, sizes, training
from .goals import COMPILED, GOALS, OURS, THEIRS, Results, Row, memory, speed
from .record import RESULTS, ROOT, Record, file_of, read_records

PAGE = ROOT / "docs" / "benchmarks.md"
SCRIPTS = {
    name: module.ROWS
    for name, module in (
        ("inference", inference),
        ("compiled", compiled),
        ("training", training),
        ("labels", labels),
        ("predict", predict),
        ("bfloat16", bfloat16),
        ("sizes", sizes),
        ("large_images", large_images),
        ("profile", profile),
        ("exports", exports),
    )
}


def read_results(folder: Path, device: str = "cpu") -> Results:
    """Records by script, row and candidate."""
    results: Results = {}
    for script in SCRIPTS:
        for record in read_records(file_of(folder, script, device)):
            results.setdefault(script, {}).setdefault(record.row, {})[record.candidate] = record
    return results


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def goal_table(results: Results) -> str:
    """Goal, measured, reached or not."""
    lines = []
    for goal in GOALS:
        measured, row = goal.measured(results), results.get(goal.script, {}).get(goal.row, {})
        if measured is None:
            notes = {each.note for each in row.values() if each.note and each.milliseconds is None}
            lines.append((goal.work, goal.format(goal.goal), "", "; ".join(notes) or "not measured", ""))
            continue
        reached = "reached" if goal.is_reached(measured) else "**not reached**"
        if any(each.quiet is False for each in row.values()):
            reached += ", machine disturbed"
        [commit] = {each.commit for each in row.values()}
        lines.append((goal.work, goal.format(goal.goal), goal.format(measured), reached, f"`{commit}`"))
    return table(("work", "goal", "measured", "", "commit"), lines)


def record_table(rows: dict[str, Row]) -> str:
    """Every record of a script."""
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


def record_sections(results: Path, link: Path) -> str:
    """Every file's records, those of a GPU beside them, where there are any."""
    sections = []
    for device in ("cpu", "cuda"):
        for script, rows in read_results(results, device).items():
            name = file_of(results, script, device).name
            about = "" if device == "cpu" else f"\n\n{machine_table({script: rows})}"
            sections.append(f"### {Path(name).stem}\n\n[{name}]({link / name}){about}\n\n{record_table(rows)}")
    return "\n\n".join(sections)


def _number(number: float | None, digits: int = 1) -> str:
    return "" if number is None else f"{number:,.{digits}f}"


def machine_table(results: Results) -> str:
    """Which machines, versions and commits the rows are of."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for script, rows in results.items():
        for row, records in rows.items():
            each = next(iter(records.values()))
            versions = f"Python {each.python}, torch {each.torch}, transformers {each.transformers}"
            place = f"{each.processor}, {each.cores} cores, {each.gibibytes} GiB, {each.system}"
            key = (place, each.device, str(each.threads), f"{versions} {each.runtimes}".strip(), each.commit, each.date)
            seen.setdefault(key, []).append(f"{script} {row}")
    everything = sum(len(rows) for rows in results.values())
    lines = [(*key, "all" if len(rows) == everything else ", ".join(rows)) for key, rows in seen.items()]
    return table(("machine", "device", "threads", "versions", "commit", "date", "rows"), lines)


def attention_table() -> str:
    """Where B0's multiply-adds go as the image grows: worked out from the configuration, as `segformer info` does."""
    config, lines = SegFormerConfig.from_variant("b0", num_labels=150), []
    for name in SCRIPTS["sizes"]:
        height, width = (int(side) for side in name.split("x"))
        rows = model_info(config, height, width)
        stages = list(zip(rows[:-1], config.depths, strict=True))
        attention = sum(
            2 * depth * stage.num_tokens * stage.num_reduced_tokens * stage.num_channels for stage, depth in stages
        )
        total = sum(row.num_multiply_adds for row in rows)
        first = rows[0]
        lines.append(
            (
                name,
                f"{first.num_tokens:,}",
                f"{first.num_reduced_tokens:,}",
                f"{total / height / width:,.0f}",
                f"{attention / height / width:,.0f}",
                f"{attention / total:.0%}",
            )
        )
    titles = ("image", "tokens N", "reduced N/R", "multiply-adds a pixel", "of them N²/R", "share")
    return table(titles, lines)


def size_table(rows: dict[str, Row]) -> str:
    """Cost of a pixel, here and there."""
    lines = []
    for name, records in rows.items():
        height, width = (int(side) for side in name.split("x"))
        cells = [name]
        for candidate in (OURS, THEIRS):
            each = records[candidate]
            cells += [_number(1e6 * each.milliseconds / height / width), _bytes(each, height * width)]
        lines.append(cells)
    titles = ("image", "ns a pixel", "bytes a pixel", "Transformers: ns a pixel", "bytes a pixel")
    return table(titles, lines)


def profile_table(rows: dict[str, Row]) -> str:
    """Each kind of operation's share of a call; the kinds in the order of the first row."""
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


def growth(rows: dict[str, Row]) -> str:
    """What the measured sizes come to, in a sentence."""
    if len(rows) < 2:
        return ""
    (small, first), *_, (large, last) = rows.items()
    pixels = [int(name.split("x")[0]) * int(name.split("x")[1]) for name in (small, large)]
    ratios = [last[name].milliseconds / first[name].milliseconds for name in (OURS, THEIRS)]
    return (
        f"From {small} to {large}, {pixels[1] / pixels[0]:.0f} times the pixels, this package took "
        f"{ratios[0]:.0f} times as long and Transformers {ratios[1]:.0f} times."
    )


def large_table(rows: dict[str, Row]) -> str:
    """Time and peak of a process by the size of the image (width x height)."""
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
    return table(("image", "windows", "time", "peak of the process", ""), lines)


def agreement_table(rows: dict[str, Row]) -> str:
    """How far labels of windows are those of the whole image."""
    lines = [
        (each.candidate, f"{1 - each.difference:.1%}", each.note, f"{each.milliseconds / 1000:,.1f} s")
        for each in rows["agreement"].values()
    ]
    return table(("windows", "labels as of the whole image", "", "time"), lines)


def demand_table(results: Results) -> str:
    """What a goal of speed asks of the machine: the time that it leaves, and the share of the peak that this takes."""
    lines = []
    for goal in GOALS:
        theirs, ours = (results.get(script, {}).get(goal.row, {}) for script in (goal.script, "compiled"))
        rates = [each.gigaflop for each in ours.values() if each.gigaflop]
        is_asked = goal.quantity is speed and goal.script in ("inference", "compiled") and goal.theirs != (OURS,)
        if not (is_asked and rates and theirs):
            continue
        took = min(theirs[name].milliseconds for name in goal.theirs if name in theirs)
        wanted, peak = took / goal.goal, ours[compiled.PRODUCT].gigaflop / ours[compiled.PRODUCT].milliseconds
        lines.append(
            (goal.work, goal.format(goal.goal), _number(took), _number(wanted), f"{rates[0] / wanted / peak:.0%}")
        )
    return table(("work", "goal", "others, ms", "the goal leaves, ms", "of the peak"), lines)


def first_calls(rows: dict[str, Row]) -> str:
    """What compiling takes, in a sentence."""
    parts = [
        f"{row.upper()} {each.first_call:.0f} s ({each.candidate.removeprefix('hf_segformer ')})"
        for row, records in rows.items()
        for each in records.values()
        if each.first_call is not None and each.candidate in COMPILED
    ]
    return f"The first call compiles: {', '.join(parts)}." if parts else ""


def write_page(page: Path, folder: Path) -> None:
    """The page from the files of a folder, and pictures into it; raises ValueError where there is nothing to show."""
    results = read_results(folder)
    if not results:
        raise ValueError("there are no measurements: make bench makes them")
    from .plots import draw_goals, draw_sizes  # matplotlib, which only the page needs

    reached = [(goal, measured) for goal in GOALS if (measured := goal.measured(results)) is not None]
    shown = []
    for quantity, title in ((speed, "Times as fast"), (memory, "Share of the memory")):
        if bars := [(goal.work, goal.goal, measured) for goal, measured in reached if goal.quantity is quantity]:
            draw_goals(bars, folder / f"{quantity.__name__}.png", quantity is memory)
            shown.append(f"![{title}, with goals]({{folder}}/{quantity.__name__}.png)")
    rows = results.get("sizes", {})
    if rows:
        draw_sizes(rows, folder / "sizes.png")
    disturbed = statistics.fmean(
        each.quiet is False for script in results.values() for row in script.values() for each in row.values()
    )
    held = sum(goal.is_reached(measured) for goal, measured in reached)
    link = Path("..") / folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    text = _PAGE.format(
        goals=goal_table(results),
        summary=f"Of {len(GOALS)} goals {len(reached)} were measured here, and {held} reached.",
        quiet=f"{QUIET:.0%}",
        label_map=math.prod(labels.SIZE) * torch.int64.itemsize // 2**20,
        disturbed=f"{disturbed:.0%}",
        machines=machine_table(results),
        attention=attention_table(),
        sizes=size_table(rows) if rows else "Not measured yet.",
        growth=growth(rows),
        large=large_table(results["large_images"]) if "large_images" in results else "Not measured yet.",
        agreement=agreement_table(results["large_images"])
        if "agreement" in results.get("large_images", {})
        else "Not measured yet.",
        profile=profile_table(results["profile"]) if "profile" in results else "Not measured yet.",
        demands=demand_table(results) if "compiled" in results else "Not measured yet.",
        first_calls=first_calls(results.get("compiled", {})),
        size_picture=f"![Time and memory of a pixel against the side of the image]({link}/sizes.png)" if rows else "",
        pictures="\n\n".join(shown).format(folder=link),
        records=record_sections(folder, link),
    )
    page.write_text(text)


_PAGE = """# Speed and memory

`make bench` measures all of this again and writes this page: no number on it is written by hand. On your own machine,
with your own model and sizes, `segformer bench` prints a table.

{summary} A factor says how many times as fast as Transformers' SegFormer with the same weights, if nothing else is
said; memory is the share of its peak.

{goals}

{pictures}

## How it is measured

- **Only equals are timed.** Each row first compares results: logits, label maps, or loss and the whole gradient without
  dropout, with LayerNorm's epsilon at 1e-5 in both. Where they differ there is no number. BatchNorm has statistics of
  its own, so that leaving it out would show.
- **In turn.** The candidates of a row take turns in one process, and the median of each counts. A round during which
  other processes used more than {quiet} of the machine is measured again. Where that did not help, the row says so:
  here it was so for {disturbed} of the records.
- **Memory** is the growth of the process's peak (VmHWM) during one call, in a fresh process for each candidate. One
  call before it warms up, so that threads, kernels and lazy imports, which cost once, are not counted; then the
  allocator gives back what it keeps. Weights and inputs are not counted; results are, and gradients. Only Linux tells
  it. ONNX Runtime and OpenVINO keep their memory between calls, so that theirs can not be told this way.
- **The same threads.** ONNX Runtime's idle threads sleep instead of spinning, OpenVINO has the hint for latency and
  float32, and there is a pause before each sample. {first_calls}
- **The peak** is the rate of the fastest product of square matrices, of three sizes and by MKL or oneDNN, which takes
  turns with the networks. The network's operations are those that `segformer info` counts, with the decode head
  folded: what folding saves does not count as computed.
- **Labels**: "scene" has logits that change slowly, "noise" has another winner at every place, which is the worst case.
  The label map itself, int64 as in Transformers, takes {label_map} MiB: less no arrangement can need.
- **Predict**: a folder of pictures to label maps, files read each time, by `SegFormerPredictor` and by Transformers'
  pipeline "image-segmentation" on its own SegFormer; "mixed" has pictures of four sizes.
- **A busy core** is another process that computes all the time, on two cores one of them.

```sh
make bench                              # all rows but those of folders and large images
make bench-large                        # these
python -m benchmarks --missing          # only rows that are not there for this commit
python -m benchmarks.inference b0       # one row
python -m benchmarks.report             # this page alone
```

A row is replaced as a whole, and never by one that failed, or was disturbed where the old one was not.

## Where the time goes

{profile}

Each operation's own time, in one thread. Matrix products, attention's among them, and convolutions are the network
itself, at the speed of PyTorch's libraries; a better arrangement can only save on the other lines: passes over memory
for norms, activations, sums and copies, and the time that Python takes to launch operations.

What the goals leave for a picture, and the share of the machine's peak that the network's products would have to run
at, if nothing else took any time:

{demands}

## Cost against size

{size_picture}

{sizes}

{growth} Nearly all a SegFormer does costs the same for every pixel: convolutions, projections, the Mix-FFN and the
decode head. Attention does not. N tokens attend to N/R others, where R is the square of the reduction (64, 16, 4 and 1
in the four stages), so its products grow as N²/R: four times the pixels, sixteen times the work. R divides it, but does
not change the power. For B0, worked out as in `segformer info` (N and N/R of the first stage, products of all):

{attention}

Memory need not follow: attention maps are never held as a whole, so the peak of a forward pass grows with the pixels.

## Images larger than memory

`predict_large_image` with a B0 of 6 classes, from a compressed GeoTIFF to a compressed GeoTIFF. The
peak is that of the whole process, Python, PyTorch and weights included. Sizes are width x height; 30000x2000 are the
first rows of an image of 30,000 x 30,000.

{large}

The network trained on CamVid on a drawn street of 1920x704 pixels, in windows and whole. Attention sees a whole window,
so a pixel far from every seam is labelled by what the window shows too; neither is the truth. (A network without
attention gives the same logits to rounding, 128 pixels away from a seam: tests/inference/test_tiling.py.)

{agreement}

## Where and when

{machines}

## All records

"Difference" is that from the first candidate, relative to the largest value; for labels, the share of pixels.

{records}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files, and of the pictures")
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
