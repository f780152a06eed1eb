"""`diagnose`: every rule over every arm of a store, and what no rule could look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fakit.experiments.doctor import losses, maps_and_data, scores
from fakit.experiments.doctor.recorded import Recorded
from fakit.experiments.doctor.rule import Finding, Lacking
from fakit.experiments.store import RunStore

ORDER = ("error", "warning", "note")
RULES = tuple(sorted((*losses.RULES, *scores.RULES, *maps_and_data.RULES), key=lambda rule: ORDER.index(rule.status)))
SHOWN = 6  # findings of a rule that are shown one by one


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found; prints itself in a terminal, draws itself in a notebook.

    Attributes:
        findings: errors first, then warnings, then notes.
        not_looked_at: what the record lacks → (rules that need it, runs that lack it).
        runs: how many were looked at.
    """

    findings: tuple[Finding, ...]
    not_looked_at: dict[str, tuple[tuple[str, ...], int]]
    runs: int

    @property
    def ok(self) -> bool:
        """True without an error or a warning; notes may remain."""
        return all(finding.status == "note" for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """One row a finding: status, rule, task, arms, seen, means, fix."""
        columns = ["status", "rule", "task", "arms", "seen", "means", "fix"]
        rows = [{**vars(finding), "arms": ", ".join(finding.arms)} for finding in self.findings]
        return pd.DataFrame(rows, columns=columns)

    def of(self, rule: str) -> list[Finding]:
        """The findings of a rule. Raises ValueError for a name that is none."""
        if rule not in (names := [one.name for one in RULES]):
            raise ValueError(f"{rule!r} is no rule; there are {', '.join(names)}.")
        return [finding for finding in self.findings if finding.rule == rule]

    def __str__(self) -> str:
        lines = self.markdown().replace("**", "").split("\n")
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)

    def _repr_markdown_(self) -> str:
        return self.markdown().replace("<", "&lt;")

    def markdown(self) -> str:
        """Rule by rule: what it means and what to try once, then what was seen, arm by arm."""
        lines = [f"The doctor found {self._counted()} in the records of {self.runs} runs.", ""]
        for rule in RULES:
            if found := self.of(rule.name):
                lines += [f"**{rule.name}** ({rule.status}). {rule.means} Try: {rule.fix}", ""]
                lines += [f"- {_where(finding)}: {finding.seen}." for finding in found[:SHOWN]]
                if rest := found[SHOWN:]:
                    lines.append(f"- and {len(rest)} more: {'; '.join(map(_where, rest))}.")
                lines.append("")
        if self.not_looked_at:
            lines += ["Not looked at:", ""]
        for what, (rules, runs) in self.not_looked_at.items():
            lines.append(f"- {'; '.join(rules)}: of {runs} runs the record lacks {what}.")
        return "\n".join(lines).rstrip() + "\n"

    def _counted(self) -> str:
        found = {status: sum(finding.status == status for finding in self.findings) for status in ORDER}
        said = [f"{n} {status}{'s' if n > 1 else ''}" for status, n in found.items() if n]
        return ", ".join(said) or "nothing"


def _where(finding: Finding) -> str:
    return f"{finding.task}, {finding.arms[0]}" if len(finding.arms) == 1 else finding.task


def diagnose(runs: str | Path | RunStore, baselines: Sequence[str] | None = None) -> Diagnosis:
    """Look through recorded runs for what often goes wrong; docs/doctor.md has the rules and their bounds.

    Args:
        runs: a store or its folder.
        baselines: the arms that gains are compared with, as in `study_table`.

    Returns:
        findings, each with what was seen, what it means and what to try; and what could not be looked at, since the
        record lacks what a rule needs.

    Raises:
        ValueError: as `study_table`: no finished run, a record that cannot be compared, no arm of `baselines`.

    >>> from fakit.files import shipped
    >>> found = diagnose(shipped("data") / "recorded/smollm2")
    >>> [finding.arms for finding in found.of("worse than labels alone")]
    [('outputs',), ('all',)]
    """
    store = runs if isinstance(runs, RunStore) else RunStore(runs)
    recorded = Recorded.of(store, baselines)
    findings: list[Finding] = []
    lacking: dict[str, dict[str, int]] = {}
    for rule in RULES:
        for seen in rule.look(recorded):
            if isinstance(seen, Lacking):
                of_rule = lacking.setdefault(seen.what, {})
                of_rule[rule.name] = of_rule.get(rule.name, 0) + seen.runs
            else:
                findings.append(
                    Finding(rule.name, rule.status, seen.task, seen.arms, seen.numbers, rule.means, rule.fix)
                )
    missed = {what: (tuple(of_rule), max(of_rule.values())) for what, of_rule in lacking.items()}
    return Diagnosis(tuple(findings), missed, sum(len(arm.records) for arm in recorded.arms))
