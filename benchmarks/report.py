"""From measured runs to the table: medians, ratios, the project's own targets; as JSON, Markdown and bars."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.bars import Bar, bars
from benchmarks.contestants import BATCH, BLOBFLOW, SCENARIOS, TRANSFERS

MIB = 1024 * 1024
_METRICS = (
    *("wall_s", "cpu_s", "peak_rss_bytes", "requests", "bytes_in", "bytes_out"),
    *("moved_again_bytes", "left_over", "operations_per_s", "cpu_s_per_gb"),
)
_TITLES = {
    "one-up": "Up: one file of {size}",
    "one-down": "Down: one file of {size}",
    "many-up": "Up: {files:,} files of 32 KiB",
    "many-down": "Down: {files:,} files of 32 KiB",
    "resume-up": "Up again after SIGKILL at half of {size}",
    "resume-down": "Down again after SIGKILL at half of {size}",
    "layers-up": "Layer: {size} in files of 4 KiB to 8 MiB, compressed into a directory",
    "layers-down": "Layer: the same, restored",
    "layers-codec": "Layer: the codec alone, on a tar of the same",
    BATCH: "Batch: {files:,} inserts, gets and deletes of 4 KiB",
    "start": "Start-up",
    "mirror": "To a mirror: {size} over loopback, sender and receiver together",
}
_MARKS = ("<!-- results:begin -->", "<!-- results:end -->")

Summary = dict[str, dict[str, dict[str, Any]]]
"""scenario -> contestant -> medians of its metrics, with `tool`, `runs`, `fastest_s`, `slowest_s`."""


def summarise(runs: Iterable[Mapping[str, Any]]) -> Summary:
    """Medians of all runs that succeeded; who failed is left out."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    failed: set[tuple[str, str]] = set()
    for entry in runs:
        cell = (entry["scenario"], entry["contestant"])
        cells.setdefault(cell, []).append(entry)
        if "error" in entry:
            failed.add(cell)
    summary: Summary = {}
    for (scenario, contestant), entries in cells.items():
        if (scenario, contestant) in failed:
            continue
        walls = [entry["wall_s"] for entry in entries]
        medians = {
            metric: statistics.median(entry[metric] for entry in entries)
            for metric in _METRICS
            if all(metric in entry for entry in entries)
        }
        extremes = {"runs": len(entries), "fastest_s": min(walls), "slowest_s": max(walls)}
        summary.setdefault(scenario, {})[contestant] = {"tool": entries[0]["tool"], **medians, **extremes}
    return summary


# What the project asks of itself


@dataclass(frozen=True)
class Target:
    """`limit` bounds a metric of one contestant: as it is, or as a multiple of the best of the peers named."""

    words: str
    scenario: str
    contestant: str
    metric: Literal["wall_s", "cpu_s", "peak_rss_bytes", "moved_again_bytes", "left_over", "cpu_s_per_gb"]
    limit: float
    peers: tuple[str, ...] | None = None
    """Tools; all their variants count. None for a bound by itself, () for every peer."""


_READY = f"{BLOBFLOW}, exported before"
_UNVERIFIED = f"{BLOBFLOW}, without SHA-256"
_BATCH = f"{BLOBFLOW}, BatchExecutor"
_SUMMED = "s5cmd + sha256sum"
TARGETS = (
    Target("wall, export included, below s5cmd", "one-up", BLOBFLOW, "wall_s", 1.0, ("s5cmd",)),
    Target("wall to s5cmd", "one-up", _READY, "wall_s", 0.45, ("s5cmd",)),
    Target("wall to obstore", "one-up", _READY, "wall_s", 0.75, ("obstore",)),
    Target("wall to boto3 s3transfer", "one-up", _READY, "wall_s", 0.20, ("boto3 s3transfer",)),
    Target("client CPU to s5cmd", "one-up", _READY, "cpu_s", 0.30, ("s5cmd",)),
    Target("wall to the fastest peer", "one-down", _UNVERIFIED, "wall_s", 1.1, ()),
    Target("wall to the fastest peer", "one-down", BLOBFLOW, "wall_s", 1.4, ()),
    Target("wall below s5cmd, then sha256sum", "one-down", BLOBFLOW, "wall_s", 1.0, (_SUMMED,)),
    Target("wall, export included, below s5cmd", "many-up", BLOBFLOW, "wall_s", 1.0, ("s5cmd",)),
    Target("wall to s5cmd", "many-up", _READY, "wall_s", 1 / 3, ("s5cmd",)),
    Target("wall to obstore", "many-up", _READY, "wall_s", 0.5, ("obstore",)),
    Target("wall below s5cmd", "many-down", BLOBFLOW, "wall_s", 1.0, ("s5cmd",)),
    Target("wall below obstore", "many-down", BLOBFLOW, "wall_s", 1.0, ("obstore",)),
    *(Target("peak RSS, bytes", scenario, BLOBFLOW, "peak_rss_bytes", 120 * MIB) for scenario in TRANSFERS),
    Target("sent again, bytes (workers x part size)", "resume-up", BLOBFLOW, "moved_again_bytes", 4 * 8 * MIB),
    Target("orphaned uploads", "resume-up", BLOBFLOW, "left_over", 0),
    Target("received again, bytes (workers x part size)", "resume-down", BLOBFLOW, "moved_again_bytes", 4 * 8 * MIB),
    Target(
        "wall below tar, zstd -T2", "layers-up", f"{BLOBFLOW}, layer, hashed before", "wall_s", 1.0, ("tar + zstd",)
    ),
    Target("wall to zstd -dc, tar", "layers-down", f"{BLOBFLOW}, layer", "wall_s", 1 / 1.5, ("tar + zstd",)),
    Target("wall below zstd -T2", "layers-codec", f"{BLOBFLOW}, layer, codec alone", "wall_s", 1.0, ("zstd",)),
    Target("wall to s5cmd (4 times its operations per second)", BATCH, _BATCH, "wall_s", 0.25, ("s5cmd",)),
    Target("wall to obstore (1.2 times its operations per second)", BATCH, _BATCH, "wall_s", 1 / 1.2, ("obstore",)),
    Target("client CPU below s5cmd", BATCH, _BATCH, "cpu_s", 1.0, ("s5cmd",)),
    Target("client CPU below obstore", BATCH, _BATCH, "cpu_s", 1.0, ("obstore",)),
    Target("seconds", "start", f"{BLOBFLOW}, --version", "wall_s", 0.25),
    Target("seconds", "start", f"{BLOBFLOW}, push, nothing changed", "wall_s", 0.8),
    Target("CPU s per GB: 400 MB/s per core", "mirror", f"{BLOBFLOW}, mirror push", "cpu_s_per_gb", 1000 / 400),
)


def check_targets(summary: Summary) -> list[dict[str, Any]]:
    """Every target whose figures were measured: what was reached, and whether that is met."""
    checked: list[dict[str, Any]] = []
    for target in TARGETS:
        scenario = summary.get(target.scenario, {})
        value = scenario.get(target.contestant, {}).get(target.metric)
        best = _best(scenario, target) if target.peers is not None else (1.0, "")
        if value is None or best is None:
            continue
        reached = value / best[0]
        checked.append(
            {
                "scenario": target.scenario,
                "contestant": target.contestant,
                "words": target.words,
                "against": best[1],
                "limit": target.limit,
                "reached": reached,
                "met": reached <= target.limit,
            }
        )
    return checked


def _best(scenario: Mapping[str, Mapping[str, Any]], target: Target) -> tuple[float, str] | None:
    """The smallest figure among the peers, and whose it is."""
    figures = [
        (figures[target.metric], name)
        for name, figures in scenario.items()
        if target.metric in figures
        and (
            figures["tool"] in (target.peers or ()) or (not target.peers and figures["tool"] not in (BLOBFLOW, _SUMMED))
        )
    ]
    return min(figures, default=None)


# Text


def line(entry: Mapping[str, Any]) -> str:
    """One run in one line, printed while the others go on."""
    head = f"{entry['scenario']:<12} {entry['contestant']:<32}"
    if "error" in entry:
        return f"{head} FAILED: {entry['error']}"
    again = f"  moved again {_mib(entry['moved_again_bytes'])} MiB" if "moved_again_bytes" in entry else ""
    return (
        f"{head} {entry['wall_s']:7.2f} s  CPU {entry['cpu_s']:7.2f} s  {_mib(entry['peak_rss_bytes']):>6} MiB{again}"
    )


def markdown(document: Mapping[str, Any]) -> str:
    """The whole table."""
    options, machine = document["options"], document["machine"]
    summary = summarise(document["runs"])
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    conditions = (
        f"{document['started'][:10]}; {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']},"
        f" Python {machine['python']}; load before {machine['load_before']}; {document['seconds']:.0f} s in all."
    )
    reading = (
        f"Medians; `n` is the number of interleaved runs: {options['runs']}, of resumption at most 3, and 2 for whoever"
        f" took more than {options['patience']:g} times as long as the fastest. Columns that end in ÷: wall and client"
        " CPU of that variant, divided by those of the row. In and out are bytes of bodies, as the server saw them."
    )
    lines = [conditions, f"Server: {document['server']}. Versions: {versions}.", "", reading, ""]
    sizes = {"size": _size(options["size"]), "files": options["files"]}
    for scenario in document["scenarios"]:
        if scenario in summary:
            lines += [f"### {_TITLES[scenario].format(**sizes)}", "", *_table(scenario, summary[scenario]), ""]
        failed = {entry["contestant"]: entry["error"] for entry in document["runs"] if _failed(entry, scenario)}
        lines += [f"- {name} failed: {error.splitlines()[0]}" for name, error in failed.items()]
        lines += [""] * bool(failed)
    lines += _target_lines(check_targets(summary))
    lines += ["### Commands", "", "```sh"]
    for scenario in document["scenarios"]:
        commands = document["commands"].get(scenario, {})
        lines += [f"# {scenario}", *(commands[name] for name in sorted(commands))]
    return "\n".join([*lines, "```", ""])


def _failed(entry: Mapping[str, Any], scenario: str) -> bool:
    return "error" in entry and entry["scenario"] == scenario


def _table(scenario: str, cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = sorted(cells.items(), key=lambda cell: cell[1]["wall_s"])
    ours = [name for name, figures in rows if figures["tool"] == BLOBFLOW]
    resumed = any("moved_again_bytes" in figures for _, figures in rows)
    versus = scenario in (*TRANSFERS, BATCH) and len(ours) < len(rows)
    header = ["", "wall s (fastest to slowest)", "CPU s", "RSS MiB", "requests", "in MiB", "out MiB"]
    batch = scenario == BATCH
    pushed = any("cpu_s_per_gb" in figures for _, figures in rows)
    header += (
        ["operations/s"] * batch
        + ["moved again MiB", "left over"] * resumed
        + ["MB per core s"] * pushed
        + ([f"{name} ÷" for name in ours] if versus else [])
        + ["n"]
    )
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for name, figures in rows:
        cell = [
            f"**{name}**" if figures["tool"] == BLOBFLOW else name,
            f"{figures['wall_s']:.2f} ({figures['fastest_s']:.2f} to {figures['slowest_s']:.2f})",
            f"{figures['cpu_s']:.2f}",
            _mib(figures["peak_rss_bytes"]),
            f"{figures['requests']:,.0f}" if "requests" in figures else "",
            _mib(figures.get("bytes_in")),
            _mib(figures.get("bytes_out")),
        ]
        if batch:
            cell.append(f"{figures['operations_per_s']:,.0f}")
        if resumed:
            cell += [_mib(figures["moved_again_bytes"]), f"{figures['left_over']:.0f}"]
        if pushed:
            cell.append(f"{1000 / figures['cpu_s_per_gb']:.0f}")
        for variant in ours if versus else ():
            mine = cells[variant]
            ratio = f"{mine['wall_s'] / figures['wall_s']:.2f} / {mine['cpu_s'] / max(figures['cpu_s'], 1e-6):.2f}"
            cell.append("" if figures["tool"] == BLOBFLOW else ratio)
        lines.append(_row([*cell, str(figures["runs"])]))
    return lines


def _target_lines(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    if not targets:
        return []
    lines = ["### Targets", "", _row(["", "", "at most", "reached", ""]), _row(["---", "---", "---:", "---:", "---"])]
    for target in targets:
        against = f" ({target['against']})" if target["against"] else ""
        figures = [
            f"{target[which]:,.0f}" if target["limit"] > 1000 else f"{target[which]:.3g}"
            for which in ("limit", "reached")
        ]
        what = f"{target['contestant']}: {target['words']}{against}"
        lines.append(_row([target["scenario"], what, *figures, "met" if target["met"] else "**missed**"]))
    return [*lines, ""]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f}" if size < 10 * MIB else f"{size / MIB:,.0f}"


def _size(size: int) -> str:
    return f"{size / 1024**3:g} GiB" if size >= 1024**3 else f"{size / MIB:g} MiB"


# Files


def load(path: Path) -> dict[str, Any]:
    """What an earlier call stored."""
    return json.loads(path.read_text(encoding="utf-8"))


def joined(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measurements of several calls as those of one; what is compared was measured in one call all the same.

    Raises:
        SystemExit: the calls moved different sizes, or measured the same scenario.
    """
    last = documents[-1]
    scenarios = [scenario for document in documents for scenario in document["scenarios"]]
    for document in documents:
        if any(document["options"][which] != last["options"][which] for which in ("size", "files", "runs", "patience")):
            raise SystemExit("benchmarks: --join takes results of the same --size, --files, --runs and --patience")
    if len(scenarios) != len(set(scenarios)):
        raise SystemExit("benchmarks: --join takes results of other scenarios than those of this call")
    return {
        **last,
        "started": documents[0]["started"],
        "seconds": sum(document["seconds"] for document in documents),
        "scenarios": [scenario for scenario in SCENARIOS if scenario in scenarios],
        "runs": [entry for document in documents for entry in document["runs"]],
        "commands": {name: text for document in documents for name, text in document["commands"].items()},
        "versions": {name: text for document in documents for name, text in document["versions"].items()},
    }


def store(document: Mapping[str, Any], results: Path) -> Path:
    """Write JSON and Markdown into `results`; returns their common path without the ending."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / time.strftime("%Y%m%d-%H%M%S")
    full = {**document, "summary": summarise(document["runs"]), "targets": check_targets(summarise(document["runs"]))}
    path.with_name(path.name + ".json").write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    path.with_name(path.name + ".md").write_text(markdown(document), encoding="utf-8")
    return path


def publish(document: Mapping[str, Any], docs: Path) -> None:
    """Put the table into `benchmarks.md` between its marks, and a picture of each transfer into `images/`."""
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    begin, end = (re.escape(mark) for mark in _MARKS)
    options = document["options"]
    sizes = {"size": _size(options["size"]), "files": options["files"]}
    pictures: list[str] = []
    for scenario, cells in summarise(document["runs"]).items():
        title = _TITLES[scenario].format(**sizes)
        name = f"bench-{scenario}.svg"
        rows = sorted(cells.items(), key=lambda cell: cell[1]["wall_s"])
        drawn = [Bar(name, cell["wall_s"], cell["cpu_s"], ours=cell["tool"] == BLOBFLOW) for name, cell in rows]
        (docs / "images").mkdir(exist_ok=True)
        (docs / "images" / name).write_text(bars(title, drawn), encoding="utf-8")
        if scenario in (*TRANSFERS, BATCH):
            pictures.append(f"![{title}: wall and CPU seconds](images/{name})")
    body = "\n\n".join([_MARKS[0], *pictures, markdown(document).rstrip(), _MARKS[1]])
    changed, count = re.subn(f"{begin}.*{end}", lambda _: body, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"benchmarks: {page.name} has no place for the table between {' and '.join(_MARKS)}")
    page.write_text(changed, encoding="utf-8")
