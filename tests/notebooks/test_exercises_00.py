"""Exercises of notebook 00: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import pytest
import torch

from tests.notebooks.cells import assert_ladder, assert_told, checks, exercise

HOOKS, TEMPERATURE, OUTPUTS, WEIGHT, BUG = (
    exercise("00", name) for name in ("hooks", "temperature", "output_term", "weight", "bug")
)


@pytest.mark.parametrize("name", ["hooks", "temperature", "output_term", "weight", "bug"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("00", name, {"torch": torch})


def hooked(
    module=lambda model, layer: [model.bert.embeddings, *model.bert.encoder.layer][layer],
    keep=lambda inputs, output: output,
    key=lambda layer, layers: layer,
    passes=1,
    remove=True,
    result=lambda kept: kept,
):
    """An answer with hooks, each part of which may be another."""

    def my_capture(model, batch, layers):
        kept = {}
        handles = []
        for layer in layers:

            def hook(_, inputs, output, layer=layer):
                kept[key(layer, layers)] = keep(inputs, output)

            handles.append(module(model, layer).register_forward_hook(hook))
        for _ in range(passes):
            model(**batch)
        if remove:
            for handle in handles:
                handle.remove()
        return result(kept)

    return my_capture


def from_the_tuple(model, batch, layers):
    states = model(**batch, output_hidden_states=True).hidden_states
    return {layer: states[layer] for layer in layers}


def late(model, batch, layers):
    """Every function that the loop makes sees the loop's last number."""
    kept = {}
    modules = [model.bert.embeddings, *model.bert.encoder.layer]
    handles = []
    for layer in layers:
        handles.append(modules[layer].register_forward_hook(lambda m, i, o: kept.update({layer: o})))  # noqa: B023
    model(**batch)
    for handle in handles:
        handle.remove()
    return kept


def from_the_list(model, layer):
    return model.bert.encoder.layer[layer]


def right_but_for_the_embeddings(model, layer):
    return model.bert.encoder.layer[layer - 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (hooked(from_the_list), "off by one: under 1 it keeps the output of block 2"),
        (hooked(right_but_for_the_embeddings), "under 0 it keeps the last block's output"),
        (hooked(keep=lambda inputs, output: inputs[0]), "off by one: under 1 it keeps the state of layer 0"),
        (hooked(keep=lambda inputs, output: inputs), "keeps a tuple in place of a tensor"),
        (hooked(keep=lambda inputs, output: (output,)), "the first entry of what a block returns"),
        (hooked(keep=lambda inputs, output: output.shape), "keeps a tuple"),
        (hooked(keep=lambda inputs, output: output.tolist()), "under 1 it keeps a list"),
        (hooked(lambda model, layer: from_the_list(model, layer).attention.self.query), "is the output of no layer"),
        (hooked(remove=False), "right, but 2 of the hooks are still there"),
        (hooked(passes=2), "the model ran 2 times for 2 layers"),
        (hooked(key=lambda layer, layers: layers.index(layer)), "asked for the layers [1, 3], its keys are [0, 1]"),
        (hooked(result=lambda kept: list(kept.values())), "returns a list; a dictionary"),
        (hooked(result=lambda kept: None), "returns a NoneType"),
        (late, "of layers (1, 3) only 3 is kept"),
        (from_the_tuple, "right, but out of transformers' own tuple"),
    ],
)
def test_a_wrong_capture_is_told_what_is_wrong(answer, message):
    assert_told(HOOKS, answer, message)


def test_the_checks_draw_nothing_from_the_readers_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert HOOKS.check(hooked()) and HOOKS.check(hooked())
    BUG.check(stepped(lambda pair: None))
    assert torch.equal(torch.rand(3), expected)


def soft(logits, tau):
    return (logits / tau).softmax(-1)


def forward(student, teacher, tau):
    p, q = soft(teacher, tau), soft(student, tau)
    return (p * (p / q).log()).sum(-1)  # (B,)


def multiplied(logits):
    taus = torch.linspace(0.001, 2, 20_000).double()
    highest = (logits * taus[:, None]).softmax(-1).max(-1).values
    return taus[(highest - 0.5).abs().argmin()].item()


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        (TEMPERATURE, lambda logits: 0.01, "more heat"),
        (TEMPERATURE, lambda logits: 1000.0, "less heat"),
        (TEMPERATURE, multiplied, "you multiply the logits by τ"),
        (OUTPUTS, lambda s, t, tau: forward(s, t, tau).mean(), "but for the factor τ²"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(t, s, tau).mean(), "the reverse divergence"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).mean() / s.shape[-1], "divide by the number of labels"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).sum(), "sum over the texts"),
        (
            OUTPUTS,
            lambda s, t, tau: -(tau**2) * (soft(t, tau) * soft(s, tau).log()).sum(-1).mean(),
            "the cross-entropy",
        ),
        (OUTPUTS, lambda s, t, tau: 0.0, "it gives 0.0000"),
        (WEIGHT, lambda terms: terms["outputs"] / (sum(terms.values()) - terms["outputs"]), "that is the inverse"),
        (WEIGHT, lambda terms: 1.0, "47 % of the total"),
        (WEIGHT, lambda terms: 0.5, "half the weight is not half the total"),
        (WEIGHT, lambda terms: sum(terms.values()) / terms["outputs"], "only the *other* terms"),
        (WEIGHT, lambda terms: 1.6 / 1.4, "for {'features': 0.1"),  # a number that is right for one dictionary
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(task, answer, message):
    assert_told(task, answer, message)


def test_a_temperature_may_be_found_by_halving():
    def my_temperature(logits):
        low, high = 0.01, 100.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if soft(logits, middle).max() > 0.5 else (low, middle)
        return low

    assert TEMPERATURE.check(my_temperature)


# the bug to find: a teacher left in train mode


def stepped(before, teacher_under=torch.no_grad, student_under=torch.enable_grad, after=lambda pair: None):
    def step(pair, batch):
        pair.train()
        before(pair)
        with teacher_under():
            theirs = pair["teacher"](**batch).logits
        with student_under():
            ours = pair["student"](**batch).logits
        after(pair)
        return ours, theirs

    return step


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (stepped(lambda pair: None), "two answers"),
        (stepped(lambda pair: torch.manual_seed(0)), "a fixed seed repeats the dropout"),
        (stepped(lambda pair: pair.eval()), "the student stands still too"),
        (stepped(lambda pair: pair["teacher"].eval(), student_under=torch.no_grad), "carry no gradient"),
        (
            stepped(lambda pair: pair["teacher"].eval().requires_grad_(), teacher_under=torch.enable_grad),
            "a gradient now",
        ),
        (stepped(lambda pair: pair["teacher"].eval(), after=lambda pair: pair.train()), "left in train mode"),
    ],
)
def test_half_a_repair_is_told_what_is_left(step, message):
    assert_told(BUG, step, message)


def test_the_colleagues_step_has_the_bug():
    """The function that the notebook shows is the one that the exercise is about."""
    import nbformat

    from tests.notebooks.cells import NOTEBOOKS

    cells = nbformat.read(NOTEBOOKS / "00_start_here.ipynb", as_version=4).cells
    (shown,) = (cell.source for cell in cells if cell.id == "s10-bug")
    namespace = {"torch": torch}
    exec(shown.split("\n\n\n")[0], namespace)
    assert_told(BUG, namespace["colleagues_step"], "two answers")


def test_every_exercise_is_tested_here():
    assert set(vars(checks("00"))) >= {"hooks", "temperature", "output_term", "weight", "bug"}
