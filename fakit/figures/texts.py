"""Texts that models wrote: beside each other, character by character, and as a draft and its teacher write one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from fakit.figures.drawing import canvas, check_keys, label_width, note
from fakit.figures.figure import Figure
from fakit.figures.theme import EXTRA, GRID, SMALL, STUDENT, TEACHER, TEXT, WIDE

MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
COLUMNS = 64  # characters of a line; a longer text goes on below
ROW = 26  # px
BLANK = "␣"  # a blank that is not the reference's

Pairs = Sequence[tuple[str, str]]


def texts_beside(
    reference: str,
    texts: Mapping[str, Pairs],
    notes: Mapping[str, str] | None = None,
    title: str = "What each of them writes",
) -> Figure:
    """A reference, and below it other texts with the characters marked that are changed, added or missing.

    Args:
        reference: the text that was wanted.
        texts: whose → its characters beside the reference's, as `fakit.evaluation.aligned` gives them: ("a", "a") the
            same, ("a", "b") changed, ("a", "") added, ("", "b") missing.
        notes: whose → a few words behind the name, such as its score.
        title: short title.

    Raises:
        ValueError: nothing to draw, or a text whose pairs are of another reference.
    """
    check_keys(texts, "texts_beside")
    rows: dict[str, Pairs] = {"reference": [(character, character) for character in reference], **texts}
    for name, pairs in rows.items():
        if (found := "".join(of for _, of in pairs)) != reference:
            raise ValueError(
                f"texts_beside: {name} stands beside {found!r:.40}, and the reference is {reference!r:.40}"
            )
    longest = max(1, *(len(pairs) for pairs in rows.values()))
    lines = -(-longest // COLUMNS)
    labels = {name: f"{name} {notes[name]}" if notes and name in notes else name for name in rows}
    left, below, above = label_width(labels.values()), 14, 88
    height = ROW * (len(rows) * lines + lines - 1)
    figure = canvas(title, (WIDE, above + height + below), {"l": left, "r": 8, "t": above, "b": below})
    marks: dict[str, list[tuple[int, float]]] = {"changed": [], "added": [], "missing": []}
    letters: list[tuple[int, float, str, str]] = []
    ticks: dict[float, str] = {}
    for number, (name, pairs) in enumerate(rows.items()):
        for place, (own, wanted) in enumerate(pairs):
            x, y = place % COLUMNS, -(place // COLUMNS * (len(rows) + 1) + number)
            kind = "same" if own == wanted else "added" if not wanted else "changed" if own else "missing"
            if kind != "same":
                marks[kind].append((x, y))
            shown = own or wanted
            letters.append((x, y, _visible(shown) if kind != "same" else shown, TEXT))
        for line in range(lines):
            ticks[-(line * (len(rows) + 1) + number)] = labels[name] if line == 0 else name
    looks = {
        "changed": {"size": 15, "symbol": "square", "color": STUDENT.tint(0.45)},
        "added": {
            "size": 14,
            "symbol": "square",
            "color": EXTRA.tint(0.2),
            "line": {"width": 1.5, "color": EXTRA.color},
        },
        "missing": {
            "size": 12,
            "symbol": "line-ew",
            "color": TEACHER.color,
            "line": {"width": 2.5, "color": TEACHER.color},
        },
    }
    for kind, places in marks.items():
        figure.add_scatter(
            x=[x for x, _ in places] or [None], y=[y for _, y in places] or [None], mode="markers", name=kind,
            marker=looks[kind], hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=[x for x, *_ in letters], y=[y for _, y, *_ in letters], text=[letter for *_, letter, _ in letters],
        mode="text", textfont={"family": MONO, "size": 13, "color": TEXT}, showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    bare = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    figure.update_layout(
        xaxis={"range": (-0.7, COLUMNS - 0.3), "showticklabels": False, **bare},
        yaxis={
            "range": (min(ticks) - 0.6, 0.6),
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            **bare,
        },
        legend={"y": 1 + 8 / height},
    )
    return Figure(figure, f"Beside ‘{reference}’: {'; '.join(_told(name, pairs) for name, pairs in texts.items())}.")


def _told(name: str, pairs: Pairs) -> str:
    kinds = Counter(
        "added" if not wanted else "changed" if own else "missing" for own, wanted in pairs if own != wanted
    )
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("changed", "added", "missing") if kinds[kind])
    return f"{name} has {counts or '0 differences'}"


def _visible(token: str) -> str:
    return {"\n": "⏎", "\t": "⇥"}.get(token, token.replace(" ", BLANK))


def draft_passes(
    tokens: Sequence[str],
    proposed: Sequence[str],
    acceptance: Sequence[float],
    passes: Sequence[int],
    ahead: int,
    cost: float | None = None,
    title: str = "Who writes what: the draft, and the teacher",
) -> Figure:
    """The teacher's text, token by token: which the draft wrote, which the teacher, and what each one's chance is.

    Args:
        tokens: the teacher's text, N tokens.
        proposed: what the draft would have written at each place, N.
        acceptance: Σ_v min(P(v), Q(v)) at each place, N in 0…1.
        passes: how many tokens each of the teacher's passes gives; they add up to N.
        ahead: γ, the tokens that the draft proposes before a pass.
        cost: of a draft's token over a teacher's; with it the summary says the speed that follows.
        title: short title.

    Raises:
        ValueError: nothing to draw, or numbers that do not fit each other.
    """
    count = len(tokens)
    if not count or {len(proposed), len(acceptance), sum(passes)} != {count}:
        raise ValueError(
            f"draft_passes: {count} tokens, {len(proposed)} proposed, {len(acceptance)} acceptances, and passes that "
            f"give {sum(passes)}: give at least one token, and as many of each"
        )
    if not all(1 <= given <= ahead + 1 for given in passes):
        raise ValueError(f"draft_passes: with {ahead} ahead a pass gives 1 to {ahead + 1} tokens; found {list(passes)}")
    ends = list(accumulate(passes))  # the place behind each pass
    own = {  # the last of a pass is the teacher's, unless the text ends with the draft's
        end - 1
        for end, given in zip(ends, passes, strict=True)
        if given == ahead + 1 or tokens[end - 1] != proposed[end - 1]
    }
    width = max(len(_visible(token)) for token in tokens)
    below = 48 if width <= 2 else 30 + 8 * min(width, 12)
    figure = canvas(title, (WIDE, 330 + below), {"l": 64, "r": 12, "t": 104, "b": below}, barmode="overlay")
    for role, name, mine in (
        (STUDENT, "the draft's, kept", [i for i in range(count) if i not in own]),
        (TEACHER, "the teacher's own", sorted(own)),
    ):
        figure.add_bar(
            x=mine or [None], y=[float(acceptance[i]) for i in mine] or [None], name=name, marker=role.bar(),
            width=0.85,  # else plotly takes the least distance of a trace's own bars
            hovertext=[_place(i, tokens, proposed, acceptance) for i in mine], hoverinfo="text",
        )  # fmt: skip
    wrong = [i for i in sorted(own) if tokens[i] != proposed[i]]
    figure.add_scatter(
        x=wrong or [None], y=[1.07] * len(wrong) or [None], mode="text",
        text=[_visible(proposed[i])[:6] for i in wrong] or [""],
        textfont={"family": MONO, "size": 13, "color": STUDENT.color}, showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    for end in ends[:-1]:
        edge = {"color": GRID, "width": 1.5, "dash": "dot"}
        figure.add_shape(type="line", x0=end - 0.5, x1=end - 0.5, y0=0, y1=1.14, line=edge)
    note(
        figure,
        "wanted",
        0,
        1.07,
        xref="paper",
        xanchor="right",
        xshift=-6,
        font={"size": SMALL, "color": STUDENT.color},
    )
    figure.update_layout(
        xaxis={
            "range": (-0.7, count - 0.3),
            "tickvals": list(range(count)),
            "ticktext": [_visible(token)[:12] for token in tokens],
            "tickangle": 0 if width <= 2 else -90,
            "ticks": "",
            "showgrid": False,
            "tickfont": {"family": MONO, "size": 13, "color": TEXT},
            "title": {"text": f"the teacher's text; dotted: its {len(passes)} passes"},
        },
        yaxis={"range": (0, 1.16), "tickvals": [0, 0.25, 0.5, 0.75, 1], "title": {"text": "acceptance Σ min(P, Q)"}},
        legend={"y": 1 + 10 / 226},
    )
    low = min(range(count), key=lambda i: acceptance[i])
    told = (
        f"With {ahead} ahead the teacher writes {count} tokens in {len(passes)} passes, {count / len(passes):.2f} a "
        f"pass; {count - len(own)} are the draft's. Acceptance is {sum(acceptance) / count:.2f} on average, "
        f"and least at {_place(low, tokens, proposed, acceptance)}"
    )
    if cost is not None:
        speed = count / len(passes) / (1 + ahead * cost)
        told += f". A draft's token costs {cost:.2f} of a teacher's: {speed:.2f} times as fast"
    return Figure(figure, f"{told}.")


def _place(i: int, tokens: Sequence[str], proposed: Sequence[str], acceptance: Sequence[float]) -> str:
    wanted = "" if proposed[i] == tokens[i] else f"; the draft wanted ‘{_visible(proposed[i])}’"
    return f"‘{_visible(tokens[i])}’, place {i + 1} ({acceptance[i]:.2f}{wanted})"
