"""Results on paper: Markdown, JSON and a figure, in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.table import Result
from fakit.figures.theme import ALIGNED, STUDENT, TEXT
from fakit.training.environment import environment


def conditions(quick: bool, repeats: int) -> str:
    """What the numbers hold for, in a sentence or two."""
    sizes = (
        "small models, which show nothing but that it runs" if quick else "BERT 6 × 384 → 3 × 384, 12 heads, V = 30,522"
    )
    found = environment()
    versions, machine = found["versions"], found["machine"]
    return (
        f"{sizes}; random weights, dropout 0, float32, forward and backward, no optimizer step except in `trainer`. "
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Seconds: median of {repeats} turns in one process. Memory: peak resident MiB of "
        "a step above models, gradients and batch, each way in a fresh process."
    )


def markdown(results: Sequence[Result], said: str) -> str:
    """A table of the rows, with the conditions above it."""
    lines = [said, "", "| row | work | against | fakit | other | ratio | bar | |", "|---|---|---|---|---|---|---|---|"]
    for r in results:
        verdict = "reached" if r.reached else "missed"
        lines.append(
            f"| {r.name} | {r.work} | {r.against} | {r.ours:.3g} {r.unit} | {r.theirs:.3g} {r.unit} | {r.ratio:.2f} | "
            f"≤ {r.bar:.2f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def peers_markdown(peers: Sequence[dict]) -> str:
    """Peers and fakit, each as a ratio to the hand-written loop that does the same work;
    a peer's loop runs in the peer's process.
    """
    lines = ["| peer | work | seconds | fakit's | memory | fakit's | |", "|---|---|---|---|---|---|---|"]
    for peer in peers:
        its = ("–", "–") if "error" in peer else (f"{peer['seconds_ratio']:.2f}", f"{peer['memory_ratio']:.2f}")
        said = peer.get("error", peer.get("note", "")).replace("|", "/")
        lines.append(
            f"| {peer['package']} | {peer['work']} | {its[0]} | {peer['fakit_seconds_ratio']:.2f} | {its[1]} "
            f"| {peer['fakit_memory_ratio']:.2f} | {said} |"
        )
    return "\n".join(lines) + "\n"


def figure(results: Sequence[Result]) -> Figure:
    """Ratios as bars on a log axis, with a tick where each had to be. 1 = as costly as the other way."""
    drawing = Figure(figsize=(11, 0.9 + 0.55 * len(results)), layout="constrained")
    axes = drawing.subplots()
    places = range(len(results))
    ratios = [r.ratio for r in results]
    least = min([*ratios, *(r.bar for r in results)]) / 1.6
    most = max([1.0, *ratios, *(r.bar for r in results)]) * 1.8
    colors = [ALIGNED.color if r.reached else STUDENT.color for r in results]
    axes.barh(places, [ratio - least for ratio in ratios], left=least, color=colors, height=0.5)
    for place, r in zip(places, results, strict=True):
        axes.plot([r.bar] * 2, [place - 0.38, place + 0.38], color="black", linewidth=2.5)
        verdict = "reached" if r.reached else "missed"
        axes.annotate(
            f"{r.ratio:.2f} (bar {r.bar:.2f}, {verdict})",
            (max(r.ratio, r.bar), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1.0, color=TEXT, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(least, most * 2)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if least <= tick <= most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(places, [f"{r.work}\nagainst {r.against}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("fakit / the other way (left is better; black tick: the bar)")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


def peers_figure(peers: Sequence[dict]) -> Figure:
    """Seconds and memory of each peer and of fakit, as ratios to the hand-written loop that does the same work."""
    drawing = Figure(figsize=(9, 1.6 + 0.7 * len(peers)), layout="constrained")
    for axes, what in zip(drawing.subplots(1, 2, sharey=True), ("seconds", "memory"), strict=True):
        for place, peer in enumerate(peers):
            bars = [
                (-0.2, peer.get(f"{what}_ratio"), STUDENT, "peer"),
                (0.2, peer[f"fakit_{what}_ratio"], ALIGNED, "fakit"),
            ]
            for shift, ratio, role, name in bars:
                if ratio is not None:
                    axes.barh(place + shift, ratio, color=role.color, height=0.36)
                said = f"{name} did not run" if ratio is None else f"{name} {ratio:.2f}"
                axes.annotate(
                    said, (ratio or 0, place + shift), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.axvline(1.0, color=TEXT, linewidth=1, linestyle=":")
        axes.margins(x=0.3)
        axes.set_xlabel(f"{what}: ratio to the hand-written loop", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(peers)), [f"{p['package']}\n{p['work']}" for p in peers], fontsize=8)
    axes.invert_yaxis()
    return drawing


def write(folder: Path, results: Sequence[Result], said: str, peers: Sequence[dict] = ()) -> list[Path]:
    """bench.json, bench.md, bench.svg where there are rows, peers.svg where there are peers; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{kind}" for kind in ("json", "md", "svg")]
    record = {"conditions": said, "rows": [r.as_dict() for r in results], "peers": list(peers)}
    paths[0].write_text(json.dumps(record, indent=2) + "\n")
    peer_table = f"\nRatios to the hand-written loop:\n\n{peers_markdown(peers)}" if peers else ""
    paths[1].write_text(markdown(results, said) + peer_table)
    drawings = {paths[2]: figure(results)} if results else {}
    if peers:
        drawings[folder / "peers.svg"] = peers_figure(peers)
    with matplotlib.rc_context({"svg.hashsalt": "fakit"}):
        for path, drawing in drawings.items():
            drawing.savefig(path)
    return [*paths[:2], *drawings]
