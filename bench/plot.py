"""Pictures of what the benchmarks recorded: one PNG for each of the files given.

    python bench/plot.py --throughput t.jsonl --growth g.jsonl --compare c.jsonl --to docs/images

Of several records of one case the last counts. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

Records = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = {"throughput": throughput, "growth": growth, "compare": compare}
    for name in pictures:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"JSON lines of {name}.py")
    parser.add_argument("--to", type=Path, default=Path(), help="a folder (default: this one)")
    arguments = parser.parse_args()
    for name, picture in pictures.items():
        if file := getattr(arguments, name):
            records = [json.loads(line) for line in file.read_text().splitlines()]
            figure = picture(records)
            figure.text(0.005, 0.01, origin(records[-1]), fontsize=7, color="0.4")
            figure.savefig(arguments.to / f"{name}.png", dpi=150)
            print(arguments.to / f"{name}.png")


def origin(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']} ({record['machine']}), {record['date']}; {versions}"


def last(records: Records, *keys: str) -> Records:
    """The last record of each combination of keys, in their order."""
    return [*{tuple(str(record[key]) for key in keys): record for record in records}.values()]


def curves(records: Records, name: Callable[[dict[str, Any]], str]) -> Iterable[tuple[str, Records]]:
    groups: dict[str, Records] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    return groups.items()


def throughput(records: Records) -> Any:
    """Tokens per second, and the share of the bandwidth, over the batch."""
    case = ("model", "dtype", "quantize", "mesh", "decode", "prompt_tokens", "new_tokens")
    records = sorted(last(records, *case, "batch"), key=lambda record: record["batch"])
    figure, (rates, shares) = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")

    def name(record: dict[str, Any]) -> str:
        weights = record["quantize"] or record["dtype"]
        lengths = f"{record['prompt_tokens']} + {record['new_tokens']} tokens"
        mesh = f" on {record['mesh']}" if record["mesh"] else ""
        return f"{record['model']}, {weights}{mesh}, {record['decode']}, {lengths}"

    for label, each in curves(records, name):
        batches = [record["batch"] for record in each]
        (line,) = rates.plot(batches, [record["batch"] / record["step_ms"] * 1e3 for record in each], "o-", label=label)
        # What one reading of the bytes of a step allows.
        floor = [record["batch"] * record["bandwidth"] / record["bytes_per_step"] for record in each]
        rates.plot(batches, floor, ":", color=line.get_color())
        shares.plot(batches, [100 * record["mbu"] for record in each], "o-", color=line.get_color())
    rates.plot([], [], ":", color="0.4", label="what the measured bandwidth allows")
    rates.set(xlabel="rows", ylabel="tokens per second, decoding", xscale="log", yscale="log", title="Throughput")
    shares.set(xlabel="rows", ylabel="% of the measured bandwidth", xscale="log", title="Bandwidth in use")
    shares.set_ylim(bottom=0)
    batches = sorted({record["batch"] for record in records})
    for axes in (rates, shares):
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)
    return _with_margin(figure)


def growth(records: Records) -> Any:
    """Milliseconds of a step over the valid length, the batch and the beams."""
    records = last(records, "shape", "dtype", "axis", "value")
    names = {"length": "valid columns", "batch": "rows", "beams": "beams of one row"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    for (axis, label), axes in zip(names.items(), panels, strict=True):
        own = sorted((record for record in records if record["axis"] == axis), key=lambda record: record["value"])
        for name, each in curves(own, lambda record: f"{record['shape']}, {record['dtype']}"):
            values, steps = ([record[key] for record in each] for key in ("value", "step_ms"))
            errors = [
                [record["step_ms"] - record["step_ms_range"][0] for record in each],
                [record["step_ms_range"][1] - record["step_ms"] for record in each],
            ]
            drawn = axes.errorbar(values, steps, yerr=errors, fmt="o-", capsize=3, label=name)
            if axis == "length" and "floor_slope_ms" in each[-1]:
                floor = [steps[0] + each[-1]["floor_slope_ms"] * (value - values[0]) for value in values]
                axes.plot(values, floor, ":", color=drawn[0].get_color(), label="with the bytes alone")
        axes.set(xlabel=label, ylabel="ms per decode step", title=f"By {axis}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if own:
            axes.legend(fontsize=8)
    return _with_margin(figure)


def compare(records: Records) -> Any:
    """Milliseconds per token of each peer as bars: a row of panels for each shape and lengths, one for each decode."""
    case = ("shape", "dtype", "prompt_tokens", "new_tokens")
    records = last(records, *case, "decode", "batch")
    shapes = list(dict.fromkeys(tuple(record[key] for key in case) for record in records))
    decodes = list(dict.fromkeys(record["decode"] for record in records))
    peers = list(dict.fromkeys(name for record in records for name in record["peers"]))
    size = (4.2 * len(decodes) + 1, 3.2 * len(shapes) + 0.8)
    figure, panels = plt.subplots(len(shapes), len(decodes), figsize=size, squeeze=False, layout="constrained")
    for shape, row in zip(shapes, panels, strict=True):
        for decode, axes in zip(decodes, row, strict=True):
            own = [record for record in records if tuple(record[key] for key in case) == shape]
            own = sorted((r for r in own if r["decode"] == decode), key=lambda record: record["batch"])
            axes.set_visible(bool(own))
            for place, name in enumerate(peers):
                shown = [(at, r["peers"][name]) for at, r in enumerate(own) if "ms" in r["peers"].get(name, {})]
                width = 0.8 / len(peers)
                bars = axes.bar(
                    [at + (place - (len(peers) - 1) / 2) * width for at, _ in shown],
                    [figures["ms"] for _, figures in shown],
                    width,
                    label=name,
                    color=f"C{place}",
                )
                labels = ["" if name == "jaxgen" else f"{figures['ratio']:.2g}x" for _, figures in shown]
                axes.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
            axes.set_xticks(range(len(own)), [str(record["batch"]) for record in own])
            axes.set(
                xlabel="rows",
                ylabel="ms per token, whole call",
                title="{}, {}, {} + {} tokens, ".format(*shape) + decode,
            )
            axes.margins(y=0.15)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{place}") for place in range(len(peers))]
    figure.legend(handles, peers, loc="outside upper center", ncols=len(peers), fontsize=8)
    return _with_margin(figure)


def _with_margin(figure: Any) -> Any:
    """With room below for where the figures come from."""
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    return figure


if __name__ == "__main__":
    main()
