"""Exercises of the notebooks: an answer is checked, and what is wrong with it is said.

    exercise = Exercise("Write the debiased HSIC.", check, hints=["nudge", "sketch", "solution"])
    exercise.check(my_hsic)        # an empty stub says "not done yet", a known wrong answer what is wrong with it

Everything here draws itself as plain HTML and markdown: no widget, so that it shows on GitHub and in a report too.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fakit.teaching.words import Page, listed

DONE, NOT_YET, WRONG = "passes", "not done yet", "not right"
_MARKS = {DONE: ("✓", "#009E73"), NOT_YET: ("…", "#7A7A7A"), WRONG: ("✗", "#D55E00")}
_HINTS = ("A nudge", "A sketch", "The solution")


@dataclass(frozen=True)
class Result:
    """What a check found: `status` is "passes", "not done yet" or "not right", `message` says why.
    True if it passes.
    """

    status: str
    message: str

    def __bool__(self) -> bool:
        return self.status == DONE

    def _repr_markdown_(self) -> str:
        mark, color = _MARKS[self.status]
        return f"<span style='color:{color}'>**{mark} {self.status}**</span> {self.message}"

    def __repr__(self) -> str:
        return f"{_MARKS[self.status][0]} {self.status}: {self.message}"


def is_empty(answer: Any) -> bool:
    """Whether an answer is still the stub: None, Ellipsis, an empty text, or a function whose body does nothing.

    A function does nothing when its body, without the docstring, is only `...`, `pass`, `return`, `return None`,
    `return ...` or `raise NotImplementedError`.
    """
    if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
        return True
    if isinstance(answer, (list, tuple)) and answer:
        return all(part is None or part is ... for part in answer)
    if not inspect.isfunction(answer):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(answer)))
    except (OSError, TypeError, SyntaxError):
        return False  # a lambda inside an expression, or no source at hand: then it is an answer
    function = next(
        (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))), None
    )
    return function is not None and all(_idle(statement) for statement in function.body)


def _idle(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)  # a docstring or `...`
    if isinstance(statement, ast.Return):
        value = statement.value
        return value is None or (isinstance(value, ast.Constant) and value.value in (None, ...))
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return False


class Exercise:
    """A question, a check that answers specifically, and a ladder of hints.

    Args:
        question: markdown.
        check: takes the answer and returns None or True where it is right, and a message that says what is wrong (a
            string) or False where it is not; what it raises on an odd answer is shown, never thrown into Run All.
        hints: up to three markdown texts: nudge, sketch, solution.
        done: what a right answer is told.
        number: notebook and place, as "00.4": what a room, and the instructor guide, calls it by.
        difficulty: 1 (a line or two that the text has just shown), 2 (a few lines of one's own) or 3 (takes thought).
        minutes: what a class should plan for it.

    Example:
        >>> exercise = Exercise("2 + 2?", lambda x: None if x == 4 else "that is 2 · 3" if x == 6 else False)
        >>> exercise.check(6)
        ✗ not right: that is 2 · 3
        >>> exercise.check(...)
        … not done yet: replace the stub with your answer, then run this cell again.
    """

    def __init__(
        self,
        question: str,
        check: Callable[[Any], str | bool | None],
        hints: Sequence[str] = (),
        done: str = "well done.",
        number: str = "",
        difficulty: int | None = None,
        minutes: int | None = None,
    ) -> None:
        if difficulty not in (None, 1, 2, 3):
            raise ValueError(f"difficulty = {difficulty!r}: 1, 2 or 3")
        if len(hints) > len(_HINTS):
            raise ValueError(f"an exercise has up to three hints (nudge, sketch, solution); found {len(hints)}")
        self.question = question
        self.done = done
        self.number = number
        self.difficulty = difficulty
        self.minutes = minutes
        self._check = check
        self._hints = tuple(hints)

    def check(self, answer: Any = None) -> Result:
        """Judge an answer; a stub is "not done yet" and costs nothing, so Run All stays green."""
        if is_empty(answer):
            return Result(NOT_YET, "replace the stub with your answer, then run this cell again.")
        try:
            verdict = self._check(answer)
        except NotImplementedError:
            return Result(NOT_YET, "a part of it still raises NotImplementedError.")
        except Exception as error:
            return Result(WRONG, f"checking it raised `{type(error).__name__}: {error}`")
        if verdict is None or verdict is True:
            return Result(DONE, self.done)
        if verdict is False:
            return Result(WRONG, "have a look at the first hint." if self._hints else "try again.")
        if isinstance(verdict, str):
            return Result(WRONG, verdict)
        raise TypeError(
            f"the check of an exercise returns None, a bool or a message; it returned {type(verdict).__name__}"
        )

    def hints(self) -> Page:
        """The ladder of hints, each collapsed."""
        named = zip(_HINTS[: len(self._hints)], self._hints, strict=True)
        return Page("\n\n".join(f"<details><summary>{name}</summary>\n\n{text}\n\n</details>" for name, text in named))

    def _repr_markdown_(self) -> str:
        dots = "" if self.difficulty is None else f"<span title='difficulty'>{self._dots}</span>"
        time = "" if self.minutes is None else f"{self.minutes} minutes"
        beside = " · ".join(part for part in (dots, time) if part)
        return f"**{self._name}.**{f' {beside}<br>' if beside else ''} {self.question}"

    def __repr__(self) -> str:
        return f"{self._name}: {self.question}"

    @property
    def _dots(self) -> str:
        return "●" * (self.difficulty or 0) + "○" * (3 - (self.difficulty or 0))

    @property
    def _name(self) -> str:
        return f"Exercise {self.number}".rstrip()


def one_of(told: Mapping[str, str | None]) -> Callable[[Any], str | None]:
    """The check of a question that a letter answers: letter → what is wrong with it, None for the right one.

    >>> one_of({"a": None, "b": "that is the teacher."})("B")
    'that is the teacher.'
    """
    letters = f"answer with one letter: {listed(told, 'or')}."
    return lambda answer: told.get(str(answer).strip().lower(), letters)


class predict:
    """A predict-first question: shown before the cell that answers it, revealed after.

    Args:
        question: markdown.
        options: the possible answers, lettered a, b, c …

    Example:
        >>> guess = predict("Does more temperature flatten?", ["yes", "no"])
        >>> guess.reveal("a", because="logits are divided by it", mine="b")
        The answer is a) yes: logits are divided by it. You said b) no.
    """

    def __init__(self, question: str, options: Sequence[str]) -> None:
        if len(options) < 2:
            raise ValueError(f"a prediction needs at least two options; found {len(options)}")
        self.question = question
        self.options = {chr(ord("a") + i): option for i, option in enumerate(options)}

    def reveal(self, answer: str, because: str = "", mine: str | None = None) -> Page:
        """The answer (a letter), why, and what the reader said; `mine` None or "" is a prediction not made.

        Raises:
            ValueError: `answer` or `mine` is none of the letters.
        """
        for name, letter in (("answer", answer), ("mine", mine)):
            if letter not in self.options and not (name == "mine" and (is_empty(letter))):
                raise ValueError(f"{name} = {letter!r}: the options are {', '.join(self.options)}")
        text = f"The answer is <b>{answer}) {self.options[answer]}</b>" + (f": {because}." if because else ".")
        if is_empty(mine):
            return Page(text)
        right = " As you said." if mine == answer else f" You said {mine}) {self.options[mine]}."
        return Page(text + right)

    def _repr_markdown_(self) -> str:
        listed = "\n".join(f"- {letter}) {option}" for letter, option in self.options.items())
        return f"**Predict first.** {self.question}\n\n{listed}"

    def __repr__(self) -> str:
        return f"Predict first. {self.question} " + " ".join(f"{k}) {v}" for k, v in self.options.items())
