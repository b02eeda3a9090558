"""Records as lines, as tables between the marks of a Markdown file, and as a picture."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.abba import Ratio
from benchmarks.peers.rows import ROWS

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
PICTURE = Path("pictures") / "peers.svg"
PAIRS = 9  # fewer give no interval to trust
Record = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def read(path: Path) -> list[Record]:
    """The last record of each row, in their order. Errors: ValueError for another file."""
    last: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            last[found["row"]] = found
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: no record of --json") from None
    return [last[row.name] for row in ROWS if row.name in last]


def verdict(record: Record, one: Record) -> str:
    """Ours beside another: "faster" or "slower" if the interval leaves 1 and the noise behind."""
    if record["pairs"] < PAIRS:
        return f"no verdict on fewer than {PAIRS} pairs"
    low, high = one["ratio"]["low"], one["ratio"]["high"]
    noise = max(record["itself"]["high"], 1 / record["itself"]["low"])
    if low > noise:
        return "faster"
    return "slower" if high < 1 / noise else "even"


def lines(record: Record) -> Iterator[str]:
    """A record for a person who waits for it."""
    yield f"{record['row']}: {record['about']}"
    for name, one in record["contenders"].items():
        beside = _beside(record, name, one)
        words = [f"{_figure(record, one):>18}", beside, one["gate"]]
        yield f"  {name:28}" + "   ".join(word for word in words if word)
    if record["idle_share"] > 0.05:
        yield f"  beware: who waited took {record['idle_share']:.0%} of a core"


def _figure(record: Record, one: Record) -> str:
    if one["missing"]:
        return one["missing"]
    figure = one["figure"]
    digits = 0 if figure >= 1000 else 1 if figure >= 100 else 2
    unit = "" if record["unit"] == "perplexity" else f" {record['unit']}"
    return f"{figure:.{digits}f}{unit}"


def _beside(record: Record, name: str, one: Record) -> str:
    """Ours beside a contender; beside itself in its own line."""
    if name == record["ours"]:
        return f"itself {Ratio(**record['itself'])}" if record["itself"] else ""
    if not one["ratio"]:
        return ""
    return f"{Ratio(**one['ratio'])}, {verdict(record, one)}"


def tables(records: Sequence[Record]) -> str:
    """Markdown: where it was measured, speeds, forwards of small decoders, perplexities."""
    timed = [one for one in records if one["itself"] and not one["goals"]]
    small = [one for one in records if one["goals"]]
    quality = [one for one in records if not one["pairs"]]
    parts = [_where(records)]
    for some, table in ((timed, _speeds), (small, _forwards), (quality, _perplexities)):
        if some:
            parts.append(table(some))
    return "\n\n".join(parts)


def _where(records: Sequence[Record]) -> str:
    first = records[0]
    found: dict[str, str] = {}
    for record in records:
        for one in record["contenders"].values():
            found |= one["versions"]
    days = sorted({record["began"][:10] for record in records})
    return (
        f"{first['cpu']}, {first['cores']} cores, {first['threads']} threads; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}; "
        f"{', '.join(f'{name} {version}' for name, version in sorted(found.items()))}."
        + _ceilings([record["ceilings"] for record in records if record["ceilings"]])
    )


def _ceilings(reached: Sequence[Mapping[str, float]]) -> str:
    """What the machine reached over the rows, from the least to the most."""
    if not reached:
        return ""
    spans = {key: _span(*_ends([one[key] for one in reached])) for key in reached[0]}
    return (
        f" In the same minutes the products of matrices reached {spans['fp32_gflops']} GFLOP/s in "
        f"fp32 and {spans['bf16_gflops']} in bf16, reading memory {spans['gbytes']} GB/s."
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _span(low: float, high: float) -> str:
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"


def _speeds(records: Sequence[Record]) -> str:
    head = "work|contender|figure|ours beside it|of the ceiling|first token|peak memory|gate"
    rows: list[list[str]] = []
    for record in records:
        for name, one in record["contenders"].items():
            is_ours = name == record["ours"]
            work = f"{record['about']} (`{record['row']}`)" if is_ours else ""
            share = f"{one['share']:.0%}" if one["share"] else ""
            first = one["notes"].get("first_token")
            shown = f"{first:.2f} s" if first else ""
            peak = f"{one['peak_mib']:.0f} MiB" if one["seconds"] and one["peak_mib"] else ""
            beside = _bold(_beside(record, name, one))
            rows.append([work, name, _figure(record, one), beside, share, shown, peak, one["gate"]])
    return _table(head, rows)


def _bold(beside: str) -> str:
    ratio, comma, word = beside.partition(", ")
    return f"**{ratio}**, {word}" if comma and word == "faster" else beside


def _forwards(records: Sequence[Record]) -> str:
    head = "work|contender|ms|goal|MiB of a call|goal|ours beside it|gate"
    rows: list[list[str]] = []
    for record in records:
        for name, one in record["contenders"].items():
            is_ours = name == record["ours"]
            goals = [f"{record['goals'][key]:g}" if is_ours else "" for key in ("ms", "mib")]
            memory = "" if one["call_mib"] is None else f"{one['call_mib']:.1f}"
            figure = one["missing"] or f"{one['figure']:.2f}"
            beside = _bold(_beside(record, name, one))
            work = record["about"] if is_ours else ""
            rows.append([work, name, figure, goals[0], memory, goals[1], beside, one["gate"]])
    return _table(head, rows)


def _perplexities(records: Sequence[Record]) -> str:
    rows = [
        [record["about"] if name == record["ours"] else "", name, _figure(record, one), one["gate"]]
        for record in records
        for name, one in record["contenders"].items()
    ]
    return _table("work|contender|perplexity|gate", rows)


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    names = head.split("|")
    found = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in found)


def write(path: Path, records: Sequence[Record]) -> None:
    """Put the tables, and the picture where matplotlib is there, between the file's marks.

    Errors: ValueError for a file without the marks, and for no record.
    """
    before, after = marked(path)
    if not records:
        raise ValueError("there is no record to write of")
    body = tables(records)
    if draw(path.parent / PICTURE, records):
        body += f"\n\n![Ours beside each peer]({PICTURE.as_posix()})"
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def marked(path: Path) -> tuple[str, str]:
    """What stands before and after the marks of a file; ValueError where they are not there."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: tables go between {BEGIN} and {END}; put both there once")
    return text.partition(BEGIN)[0], text.partition(END)[2]


def draw(path: Path, records: Sequence[Record]) -> bool:
    """Each ratio with its interval, and in grey ours against itself; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [
        (f"{record['row']}: {name}", one["ratio"], record["itself"], verdict(record, one))
        for record in records
        for name, one in record["contenders"].items()
        if one["ratio"]
    ][::-1]
    if not shown:
        return False
    figure = Figure(figsize=(8, 1 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colors = {"faster": "tab:green", "slower": "tab:red"}
    for place, (_, ratio, itself, word) in enumerate(shown):
        axes.plot([itself["low"], itself["high"]], [place] * 2, color="0.8", linewidth=7)
        color = colors.get(word, "0.3")
        axes.plot([ratio["low"], ratio["high"]], [place] * 2, color=color)
        axes.plot(ratio["median"], place, "o", color=color, markersize=5)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), [name for name, *_ in shown], fontsize=8)
    axes.set_ylim(-1, len(shown))
    axes.set_xlabel("how many times as fast ours is (95 % interval; grey: ours against itself)")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date in it: the same figures give the same file.
    figure.savefig(path, metadata={"Date": None})
    return True
