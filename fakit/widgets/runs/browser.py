"""Run browser: a table of recorded runs, their curves, and cost against quality;
what is chosen in one is chosen in all.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from fakit.experiments.store import RunStore
from fakit.experiments.table import distinct_arms, scale
from fakit.figures import Figure, runs_overview
from fakit.figures.chart import DASHES, SYMBOLS, Axis, Chart, text
from fakit.figures.drawing import distinct
from fakit.figures.results import pareto_front
from fakit.figures.runs import run_role
from fakit.widgets.panel import with_still

HERE = Path(__file__).parent
# What a run may have recorded as its cost, by the last part of its column's name: how it is called, and its factor.
COSTS = {
    "parameters": ("parameters (millions)", 1e-6),
    "flops": ("training FLOPs (10¹²)", 1e-12),
    "seconds": ("training time (s)", 1.0),
    "forward_flops": ("FLOPs a forward pass (10⁹)", 1e-9),
    "latency": ("latency (ms)", 1e3),
    "peak_memory": ("peak memory (MB)", 1e-6),
}
WIDTH, HEIGHT = 410, 300  # px of a figure
BOX = {"left": 58, "right": 398, "top": 26, "bottom": 256}  # px, its plot area
NOT_CURVES = {"run_id", "step", "epoch", "learning_rate"}


class RunBrowser(anywidget.AnyWidget):
    """See `run_browser`.

    The page sets traits; Python says what follows from them in `view`.

    Attributes:
        task: the task whose runs are shown, one of `tasks`.
        arms: the arms that are shown; a change of task shows all of that task's.
        sort, descending: the column the table goes by ("arm", "seed", "score", "agreement", or a cost).
        cost: what the second figure has on its first axis; curve: what the first draws.
        selected: run ids, in the order in which they were chosen; a traitlet: `browser.observe(redraw, "selected")`.
    """

    _esm = HERE / "browser.js"
    _css = HERE / "browser.css"
    task = traitlets.Unicode().tag(sync=True)
    arms = traitlets.List(traitlets.Unicode()).tag(sync=True)
    sort = traitlets.Unicode("score").tag(sync=True)
    descending = traitlets.Bool(True).tag(sync=True)
    cost = traitlets.Unicode().tag(sync=True)
    curve = traitlets.Unicode().tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    view = traitlets.Dict(help="what follows: rows, both drawings, sentence").tag(sync=True)

    def __init__(self, store: RunStore | str | Path, task: str | None = None):
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        runs = self.store.runs()
        if runs.empty:
            raise ValueError(f"{self.store.path} holds no finished run yet; `fakit distill CONFIG.yaml` adds some.")
        scores = runs["score"].astype(float).replace([np.inf, -np.inf], np.nan)  # null, or where it diverged inf
        self._runs = runs.assign(arm=distinct_arms(runs), score=scores).set_index("run_id", drop=False)
        self._steps = self.store.steps()
        self._costs = _cost_columns(self._runs)
        self._curve_names = [
            c for c in self._steps if c not in NOT_CURVES and "/" not in c and _numeric(self._steps[c])
        ]
        self.tasks = distinct(self._runs["task"])
        task = self.tasks[0] if task is None else task
        trained = self._of(task)[self._of(task)["kind"] == "run"] if "kind" in self._runs else self._of(task)
        telling = [
            name for name in self._costs if trained[name].nunique() > 1
        ]  # students of one size: not by their size
        start = {
            "arms": distinct(self._of(task)["arm"]),
            "cost": next(iter([*telling, *self._costs]), ""),
            "descending": bool(self._of(task)["higher_is_better"].iloc[0]) if task in self.tasks else True,
            "curve": "loss" if "loss" in self._curve_names else next(iter(self._curve_names), ""),
        }
        super().__init__(task=task, **start)
        self._refresh()
        self.observe(self._follow_task, "task")
        self.observe(self._refresh, ["arms", "sort", "descending", "cost", "curve", "selected"])

    # -- what is shown ------------------------------------------------------------------------------------------------

    @property
    def shown(self) -> pd.DataFrame:
        """The runs of the task and arms of now, in the table's order: the store's columns, by run id."""
        runs = self._of(self.task)
        runs = runs[runs["arm"].isin(self.arms)]
        # nothing recorded goes last, whichever way it is sorted; the rest of the order stays
        return runs.sort_values(
            self._column(self.sort), ascending=not self.descending, kind="stable", na_position="last"
        )

    def frame(self) -> pd.DataFrame:
        """The table as it is shown: run_id, selected, arm, kind, seed, score, agreement, costs in their units."""
        shown = self.shown
        columns = {"run_id": shown["run_id"], "selected": shown["run_id"].isin(self.selected)}
        columns |= {name: shown[name] for name in ("arm", "kind", "seed", "score")}
        if (agreement := self._column("agreement")) in shown:
            columns["agreement"] = shown[agreement]
        columns |= {self._costs[name][0]: shown[name] * self._costs[name][1] for name in self._costs}
        return pd.DataFrame(columns).reset_index(drop=True)

    @property
    def sentence(self) -> str:
        """How many runs are shown and chosen, and what is the best of them."""
        shown = self.shown
        if shown.empty:
            return f"No run of {self.task} is shown: every arm is off."
        chosen = shown[shown["run_id"].isin(self.selected)]
        of_these, higher = ("" if chosen.empty else " of these"), bool(shown["higher_is_better"].iloc[0])
        counts = f"{len(shown)} runs of {self.task}, {len(chosen)} chosen"
        asked = shown if chosen.empty else chosen
        pool = asked[asked["score"].notna()]
        if pool.empty:
            return f"{counts}; no score is recorded{of_these}."
        best = pool.loc[pool["score"].idxmax() if higher else pool["score"].idxmin()]
        factor, unit = scale(best["metric"])
        missing = f"; {len(asked) - len(pool)} without a score" if len(pool) < len(asked) else ""
        return (
            f"{counts}; best{of_these}: {best['arm']}, seed {best['seed']}, {best['metric']} "
            f"{factor * best['score']:.2f}{unit}{missing}."
        )

    @property
    def figure(self) -> Figure | None:
        """Curves and front of now: the still picture of a page without a kernel; None where every arm is off."""
        shown = self.shown
        if shown.empty:
            return None
        rows = []
        for run_id, run in shown.iterrows():
            steps, values = self._curve_of(run_id)
            look = {"steps": steps, "values": values, "chosen": run_id in self.selected}
            cost = self._cost_of(run) if self.cost else None
            rows.append(
                {
                    "run_id": run_id,
                    "arm": run["arm"],
                    "seed": run["seed"],
                    "cost": cost,
                    "quality": run["score"],
                    **look,
                }
            )
        labels = {"curve_label": self.curve or "loss", "cost_label": self._costs[self.cost][0] if self.cost else "cost"}
        first = shown.iloc[0]
        labels |= {"quality_label": first["metric"], "higher_is_better": bool(first["higher_is_better"])}
        return runs_overview(rows, self.front(), **labels, title=f"Runs of {self.task}")

    def front(self) -> list[tuple[float, float]]:
        """(cost, score) of the arms that no other beats, by rising cost: means over seeds,
        as the best seed of many is luck.
        """
        shown = self.shown
        if not self.cost or shown.empty:
            return []
        means = shown.assign(cost=shown[self.cost] * self._costs[self.cost][1]).groupby("arm", sort=False)
        means = means[["cost", "score"]].mean().dropna()
        sign = 1.0 if shown["higher_is_better"].iloc[0] else -1.0
        kept = pareto_front(means["cost"].tolist(), (sign * means["score"]).tolist())
        return [(float(means["cost"].iloc[i]), float(means["score"].iloc[i])) for i in kept]

    def _of(self, task: str) -> pd.DataFrame:
        return self._runs[self._runs["task"] == task]

    def _column(self, name: str) -> str:
        return "test.agreement" if name == "agreement" else name

    def _cost_of(self, run: pd.Series) -> float | None:
        value = run[self.cost]
        return None if pd.isna(value) else float(value) * self._costs[self.cost][1]

    def _curve_of(self, run_id: str) -> tuple[list[float], list[float]]:
        if not self.curve:
            return [], []
        rows = self._steps[self._steps["run_id"] == run_id][["step", self.curve]]
        rows = rows.replace([np.inf, -np.inf], np.nan).dropna()
        return rows["step"].tolist(), rows[self.curve].tolist()

    # -- what the page draws ------------------------------------------------------------------------------------------

    def _follow_task(self, change: object = None) -> None:
        if self.sort == "score":  # best first, for errors as for accuracies
            self.descending = bool(self._of(self.task)["higher_is_better"].iloc[0])
        self.arms = distinct(self._of(self.task)["arm"])
        self._refresh()

    def _refresh(self, change: object = None) -> None:
        shown, looks = self.shown, [(name, run_role(name)) for name in distinct(self._of(self.task)["arm"])]
        self.view = {
            "tasks": self.tasks,
            "arms": [{"name": name, "color": role.color, "symbol": SYMBOLS[role.symbol]} for name, role in looks],
            "columns": self._columns(),
            "curves": [{"name": name, "label": name.replace("_", " ")} for name in self._curve_names],
            "costs": [{"name": name, "label": label} for name, (label, _) in self._costs.items()],
            "rows": self._rows(),
            "lines": self._lines(shown),
            "points": self._points(shown),
            "sentence": self.sentence,
        }

    def _columns(self) -> list[dict[str, str]]:
        of_task = self._of(self.task)
        metric = of_task["metric"].iloc[0]
        named = [("arm", "arm"), ("seed", "seed"), ("score", f"{metric}{scale(metric)[1]}")]
        if of_task.get("test.agreement", pd.Series(dtype=float)).notna().any():
            named.append(("agreement", "agreement %"))
        named += [(name, label) for name, (label, _) in self._costs.items() if of_task[name].notna().any()]
        return [{"name": name, "label": label} for name, label in named]

    def _rows(self) -> list[dict[str, Any]]:
        columns = [column["name"] for column in self._columns()]
        rows = []
        for run_id, run in self.shown.iterrows():
            cells = {name: self._cell(run, name) for name in columns}
            rows.append(
                {"id": run_id, "arm": run["arm"], "seed": int(run["seed"]), "cells": [cells[name] for name in columns]}
            )
        return rows

    def _cell(self, run: pd.Series, name: str) -> str:
        value = run[self._column(name)]
        if name in ("arm", "seed"):
            return str(value)
        if pd.isna(value):
            return "–"
        if name in self._costs:
            return f"{value * self._costs[name][1]:.4g}"
        factor = 100.0 if name == "agreement" else scale(run["metric"])[0]
        return f"{factor * value:.2f}"

    def _lines(self, shown: pd.DataFrame) -> str:
        """The drawing of the curves."""
        found = {run_id: list(zip(*self._curve_of(run_id), strict=True)) for run_id in shown["run_id"]}
        found = {run_id: points for run_id, points in found.items() if points}
        x, y = (Axis.around(point[i] for points in found.values() for point in points) for i in (0, 1))
        chart, lines = Chart(x, y, **BOX), {}
        for run_id, points in found.items():
            role, d = run_role(shown.loc[run_id, "arm"]), chart.path(points)
            look = f'stroke="{role.color}" stroke-dasharray="{DASHES[role.dash]}"'
            lines[run_id] = f'<path class="reach" d="{d}"/><path class="curve" d="{d}" {look}/>'
        words = {"name": "curves of the runs", "label": "step", "heading": self.curve.replace("_", " ")}
        return self._drawing(chart, lines, shown, **words)

    def _points(self, shown: pd.DataFrame) -> str:
        """The drawing of cost against quality; up is better."""
        costs = {run_id: self._cost_of(run) for run_id, run in shown[shown["score"].notna()].iterrows() if self.cost}
        known = {run_id: cost for run_id, cost in costs.items() if cost is not None}
        first = self._of(self.task).iloc[0]
        factor, unit = scale(first["metric"])
        log = bool(known) and min(known.values()) > 0 and max(known.values()) > 20 * min(known.values())
        quality = {run_id: factor * shown.loc[run_id, "score"] for run_id in known}
        y = Axis.around(quality.values(), falling=not first["higher_is_better"])
        chart, points = Chart(Axis.around(known.values(), log), y, **BOX), {}
        for run_id, cost in known.items():
            role, (across, down) = run_role(shown.loc[run_id, "arm"]), chart.at(cost, quality[run_id])
            place = f'fill="{role.color}" transform="translate({across:.1f} {down:.1f})"'
            points[run_id] = f'<path class="point" d="{SYMBOLS[role.symbol]}" {place}/>'
        stairs = chart.stairs((cost, factor * score) for cost, score in self.front())
        words = {"label": self._costs[self.cost][0] if self.cost else "", "heading": f"{first['metric']}{unit}"}
        return self._drawing(chart, points, shown, name="cost against quality", stairs=stairs, **words)

    def _drawing(
        self,
        chart: Chart,
        marks: dict[str, str],
        shown: pd.DataFrame,
        *,
        name: str,
        label: str,
        heading: str,
        stairs: str = "",
    ) -> str:
        """One SVG: `marks` by run id, the chosen ones on top, on the chart's axes where there is anything to show."""
        some = any(run_id in self.selected for run_id in shown["run_id"])
        groups = []
        for run_id in sorted(marks, key=self.selected.__contains__):
            look = "run chosen" if run_id in self.selected else "run faded" if some else "run"
            title = f"{shown.loc[run_id, 'arm']}, seed {shown.loc[run_id, 'seed']}"
            groups.append(
                f'<g class="{look}" data-run="{escape(run_id)}"><title>{escape(title)}</title>{marks[run_id]}</g>'
            )
        missing = len(shown) - len(marks)
        parts = [
            f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{name}">',
            chart.frame(label) if marks else "",
            f'<g class="heading">{text(chart.left, 14, heading if marks else "")}</g>',
            f'<path class="front" d="{stairs}"/>' if stairs else "",
            *groups,
            text(chart.right, 14, f"{missing} without this record", anchor="end") if missing else "",
        ]
        return "".join(parts) + "</svg>"

    # -- what may be set ----------------------------------------------------------------------------------------------

    @traitlets.validate("task", "sort", "cost", "curve")
    def _check_name(self, proposal: dict) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        known = {
            "task": self.tasks,
            "sort": ["arm", "seed", "score", *(["agreement"] if "test.agreement" in self._runs else []), *self._costs],
            "cost": [*self._costs] or [""],
            "curve": self._curve_names or [""],
        }[name]
        if value not in known:
            raise ValueError(
                f"{name} = {value!r} is not among the recorded ones; there are {', '.join(map(repr, known))}."
            )
        return value

    @traitlets.validate("selected")
    def _check_selected(self, proposal: dict) -> list[str]:
        if unknown := [run_id for run_id in proposal["value"] if run_id not in self._runs.index]:
            raise ValueError(f"{', '.join(unknown)} is not recorded in {self.store.path}; .frame() lists the run ids.")
        return list(dict.fromkeys(proposal["value"]))

    # -- display ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        figure = self.figure
        return f"Run browser: {self.sentence}" + ("" if figure is None else f" {figure.summary}")

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return with_still(super()._repr_mimebundle_(**kwargs), self.figure, repr(self))


def run_browser(store: RunStore | str | Path, task: str | None = None) -> RunBrowser:
    """Recorded runs in a table, their curves, and cost against quality, linked:
    `.selected` are the chosen run ids, `.frame()` the table.

    Choose by a row's box, or by a click on a line or a point. The dotted front joins the arms (means over seeds)
    that no other beats.

    Args:
        store: a runs directory (`fakit distill` and `fakit study` write them), or its `RunStore`.
        task: shown first; the first recorded one unless given.

    Raises:
        ValueError: no runs directory, no finished run, an unknown task.

    >>> browser = run_browser("data/recorded/study", task="glosses")  # doctest: +SKIP
    >>> browser.selected = browser.frame().query("arm == 'all'").run_id.tolist()  # doctest: +SKIP
    """
    return RunBrowser(store, task)


def _numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(np.isfinite(column).any())


def _cost_columns(runs: pd.DataFrame) -> dict[str, tuple[str, float]]:
    """Column → (label, factor), in the order of COSTS."""
    by_name = {column.rsplit(".", 1)[-1]: column for column in runs if not column.startswith("config.")}
    found = [(by_name[name], *shown) for name, shown in COSTS.items() if name in by_name]
    return {column: (label, factor) for column, label, factor in found if _numeric(runs[column])}
