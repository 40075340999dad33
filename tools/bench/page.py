"""Writes the part of tools/bench/README.md that is made from the files in tools/bench/results.

    python -m tools.bench.page                                      # after python -m tools.bench.gpu
    python -m tools.bench.page --check                              # whether the page is that of the files; 1 if not

Cells that no file fills say so; files of quick runs are left out.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import boundary

HERE = Path(__file__).parent
BEGIN, END = "<!-- begin: python -m tools.bench.page -->", "<!-- end: python -m tools.bench.page -->"
UNKNOWN = "not measured on a GPU yet"
METHODS, SIZES = ("vae", "gan", "vaegan"), (28, 64, 256)
WHOLE = ("eager", "auto", "compiled", "networks compiled, eager", "networks compiled, auto")
TARGETS = (
    # op, shape, mode, of copy, x plain, x compiled: what is aimed at on an H100
    ("group_norm_silu", "8x128x256x256", "fwd", 0.75, 4.0, 1.0),
    ("group_norm_silu", "8x128x256x256", "full", 0.70, 3.5, 1.0),
    ("lpips_head", "8x64x256x256", "fwd", 0.75, 8.0, 1.1),
    ("lpips_head", "8x64x256x256", "full", 0.70, 8.0, 1.1),
    ("laplace", "64x3x256x256", "full", 0.70, 3.0, 0.95),
    ("reparameterize_kl", "64x16x64x64", "full", 0.60, 5.0, 1.2),
    ("laplace", "8x3x256x256", "full", None, 4.0, 1.0),
    ("reparameterize_kl", "8x4x32x32", "full", None, 4.0, 1.0),
)
WHOLE_TEXT = """\
Images a second of `eager`, plain torch throughout; beside it, how many times as fast as that. `auto` is what a run
takes: kernels on a GPU, plain torch on a CPU, where nothing may get slower by it."""
MEMORY_TEXT = """\
Shapes and dtypes of the real step; nothing is computed and no
GPU is needed. plain is the code that people have under CUDA's autocast; shares are of the column's total."""
OPERATIONS_TEXT = """\
Forward and backward (noise: forward). of copy: the time of a copy of the bytes that none can avoid, in the same
process, over the operation's. x plain, x compiled: times as fast. B/el: bytes an element kept for the backward.
error: of value and gradient, from float64, of the largest."""
PENALTIES_TEXT = """\
A discriminator's step with R1 and R2, as a multiple of the same step without: aimed at 2 at most, in every update.
torch: by torch's own second derivatives."""
Found = Mapping[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER", help="(default: results/)")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", metavar="FILE", help="(default: README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is not that of the files")
    return parser.parse_args(argv)


def read(folder: Path) -> list[dict[str, Any]]:
    """Every file of figures, GPUs first. ValueError, naming the file, for one that is none."""
    if not folder.is_dir():
        raise ValueError(f"--results: {folder} is no folder")
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            file = json.loads(path.read_text())
            assert file["kind"] in ("cpu", "cuda") and isinstance(file["stages"], dict)
        except (ValueError, KeyError, AssertionError):
            raise ValueError(f"{path}: is no file of tools/bench/gpu.py; remove it or measure again") from None
        if not file.get("quick"):
            found.append(file)
    return sorted(found, key=lambda file: file["kind"] != "cuda")


# ---------------------------------------------------------------------------------------------- tables
def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def origin(file: Found, stage: str) -> str:
    """Device, date, versions, commit and load, and how a stage ended that did not end well."""
    found = file["stages"][stage]
    machine, versions = file["machine"], file["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "triton"))
    load = f", {machine['cores']} cores under a load of {found['load']:.0f}" if file["kind"] == "cpu" else ""
    ended = "" if found["ended"] == "done" else f"; {found['ended']}"
    return f"{file['device']}{load}, {told}, {found['date'][:10]}, {found['commit']}{ended}:"


def ratio(row: Found) -> str:
    spread = row["ratio_to_eager"]
    return f"{spread['median']:.2f} ({spread['least']:.2f}-{spread['most']:.2f})"


def steps(files: Sequence[Found]) -> list[str]:
    lines = ["## Whole steps, with each fused part on and off", ""]
    lines += [WHOLE_TEXT, ""]
    models = [f"{method}-{size}" for size in SIZES for method in METHODS]
    gpus = [file for file in files if file["kind"] == "cuda" and "step" in file["stages"]]
    for file in gpus or [None]:
        if file is not None:
            lines += [origin(file, "step"), ""]
        rows = {} if file is None else {(r["model"], r["variant"]): r for r in file["stages"]["step"].get("rows", [])}
        variants = dict.fromkeys([*WHOLE, *(variant for _, variant in rows)])
        lines += table(
            ["on a GPU, bf16", *variants],
            ([model, *(_cell(rows.get((model, variant)), variant) for variant in variants)] for model in models),
        )
    for file in files:
        if file["kind"] == "cpu" and "step" in file["stages"]:
            rows = {(r["model"], r["variant"]): r for r in file["stages"]["step"].get("rows", [])}
            names = list(dict.fromkeys(model for model, _ in rows))
            lines += [origin(file, "step"), ""]
            lines += table(
                ["on a CPU, one thread", *names],
                (
                    [variant, *(_cell(rows.get((name, variant)), variant, missing="") for name in names)]
                    for variant in dict.fromkeys(variant for _, variant in rows)
                ),
            )
    return lines


def _cell(row: Found | None, variant: str, *, missing: str = UNKNOWN) -> str:
    if row is None:
        return missing
    if "absent" in row:
        return "refused"
    return f"{row['images_per_s']:,.0f}" if variant == "eager" else ratio(row)


def memory(files: Sequence[Found]) -> list[str]:
    lines = ["## Memory and bytes of a step, counted", ""]
    found = [file for file in files if file["stages"].get("activations", {}).get("rows")]
    if not found:
        return [*lines, "Not counted yet.", ""]
    stage = found[-1]["stages"]["activations"]
    rows = stage["rows"]
    size = f"{stage['size']} px, batch {stage['batch']}, {stage['precision']}"
    lines += [f"`{stage['config']}`, LPIPS on VGG16, {size}. {MEMORY_TEXT}", ""]
    impls = [row["impl"] for row in rows]

    def part(row: Found, key: str, name: str, total: str) -> str:
        size = row[key].get(name, 0)
        return f"{size / 1e9:.2f} ({size / row[total]:.0%})"

    body = [["**GB at the peak**", *(f"**{row['peak'] / 1e9:.2f}**" for row in rows)]]
    body += [[name, *(part(row, "at_peak", name, "peak") for row in rows)] for name in _largest(rows, "at_peak")]
    body += [["**GB moved in an update**", *(f"**{row['moved'] / 1e9:.1f}**" for row in rows)]]
    body += [[name, *(part(row, "moved_by", name, "moved") for row in rows)] for name in _largest(rows, "moved_by")]
    lines += table(["", *impls], body)
    gpus = [file for file in files if file["kind"] == "cuda" and "auto" in file["stages"].get("profile", {})]
    peaks = [f"{f['device']}: {f['stages']['profile']['eager']['peak_bytes'] / 1e9:.2f} GB eager, "
             f"{f['stages']['profile']['auto']['peak_bytes'] / 1e9:.2f} GB auto" for f in gpus]  # fmt: skip
    return [*lines, f"The same step's peak on a GPU: {'; '.join(peaks) or UNKNOWN}.", ""]


def _largest(rows: Sequence[Found], key: str) -> list[str]:
    sizes: dict[str, int] = {}
    for row in rows:
        for name, size in row[key].items():
            sizes[name] = max(sizes.get(name, 0), size)
    return [
        name for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]) if size > 0.005 * sum(sizes.values())
    ]


def operations(files: Sequence[Found]) -> list[str]:
    lines = ["## Fused operations", "", OPERATIONS_TEXT, ""]
    gpus = [file for file in files if file["kind"] == "cuda" and "losses" in file["stages"]]
    body = []
    for op, shape, mode, *wanted in TARGETS:
        cells = [f"{op} {shape} {mode}"]
        for key, target in zip(("of_copy", "vs_plain", "vs_compiled"), wanted, strict=True):
            cells += ["" if target is None else f"{target:g}", _measured(gpus, op, shape, mode, key)]
        body.append(cells)
    head = ["triton on a GPU, aimed at (H100) and found", "of copy", "found", "x plain", "found", "x compiled", "found"]
    lines += table(head, body)
    for file in files:
        rows = [row for row in file["stages"].get("losses", {}).get("rows", []) if _shown(row)]
        if not rows:
            continue
        lines += [origin(file, "losses"), ""]
        head = ["", "impl", "ms", "of copy", "x plain", "x compiled", "launches", "peak MB", "B/el", "error"]
        lines += table(head, map(_operation, rows))
    return lines


def _shown(row: Found) -> bool:
    return "refused" in row or row.get("mode") == "full" or (row["op"] == "noise" and row.get("mode") == "fwd")


def _operation(row: Found) -> list[str]:
    name = f"{row['op']} {row['shape']} {row['dtype']}" + (" contiguous" if row["layout"] == "contiguous" else "")
    if "refused" in row:
        return [name, row["impl"], f"refused: {row['refused']}", *[""] * 7]
    errors = " ".join(f"{row[key]:.0e}" for key in ("error", "gradient_error") if row.get(key) is not None)

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row.get(key) is None else format(row[key] / scale, form)

    return [
        name, row["impl"], number("ms", ".3f"), number("of_copy", ".2f"), number("vs_plain", ".2f"),
        number("vs_compiled", ".2f"), str(row["launches"]),
        number("peak", ".1f", 1e6), number("saved", ".1f"), errors,
    ]  # fmt: skip


def _measured(gpus: Sequence[Found], op: str, shape: str, mode: str, key: str) -> str:
    found = [
        row[key]
        for file in gpus
        for row in file["stages"]["losses"].get("rows", [])
        if (row["op"], row["shape"], row.get("mode"), row["impl"]) == (op, shape, mode, "triton")
        and row["layout"] == "channels_last" and row.get(key) is not None
    ]  # fmt: skip
    return ", ".join(f"{value:.2f}" for value in found) or UNKNOWN


def penalties(files: Sequence[Found]) -> list[str]:
    lines = ["## Penalties", "", PENALTIES_TEXT, ""]
    found = [file for file in files if file["stages"].get("penalties", {}).get("cost")]
    if not any(file["kind"] == "cuda" for file in found):
        lines += [f"On a GPU: {UNKNOWN}.", ""]
    for file in found:
        costs = file["stages"]["penalties"]["cost"]
        names = list(next(iter(costs.values())))
        lines += [origin(file, "penalties"), ""]
        lines += table(
            ["discriminator", "plain, ms", *names[1:]],
            (
                [network, f"{ms['plain']:.1f}", *(f"{ms[name] / ms['plain']:.2f}" for name in names[1:])]
                for network, ms in costs.items()
            ),
        )
    return lines


def others(files: Sequence[Found]) -> list[str]:
    """Tests on GPUs, penalties, and what takes a step's time there."""
    gpus = [file for file in files if file["kind"] == "cuda"]
    lines = ["## On GPUs", ""]
    tests = [f"{f['device']}: {f['stages']['tests'].get('said', f['stages']['tests']['ended'])}" for f in gpus
             if "tests" in f["stages"]]  # fmt: skip
    lines += table(["", ""], [
        ["tests of kernels, natively", "; ".join(tests) or UNKNOWN],
        *([["where a step's time goes", UNKNOWN]] if not any("profile" in f["stages"] for f in gpus) else []),
    ])  # fmt: skip
    for file in gpus:
        profile = file["stages"].get("profile", {})
        for impl in ("eager", "auto"):
            if impl in profile:
                rows = profile[impl]["top"][:12]
                lines += [f"{profile['model']}, {impl}, {profile[impl]['ms']:.1f} ms a step on {file['device']}:", ""]
                cells = ([f"`{row['name']}`", str(row["calls"]), f"{row['share']:.1%}"] for row in rows)
                lines += table(["kernel", "calls", "share"], cells)
    return lines


def render(files: Sequence[Found]) -> str:
    return (
        "\n".join([*steps(files), *memory(files), *penalties(files), *operations(files), *others(files)]).rstrip()
        + "\n"
    )


def main(argv: list[str]) -> int:
    given = parse(argv)
    text = given.page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{given.page}: has no place for the figures, from {BEGIN} to {END}; put the two lines in")
    before, _, rest = text.partition(BEGIN)
    new = f"{before}{BEGIN}\n\n{render(read(given.results))}\n{END}{rest.partition(END)[2]}"
    if given.check:
        current = new == text
        print(f"{given.page}: {'is' if current else 'is NOT'} that of the files in {given.results}")
        return 0 if current else 1
    given.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
