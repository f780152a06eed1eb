"""A student as a draft: acceptance and passes by hand, and what `generate` itself does with it."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from fakit.evaluation import DraftedText, draft_quality, drafted_texts
from fakit.evaluation.drafts import DraftQuality
from fakit.evaluation.generation import generate
from tests.families import tiny

EOS, PAD = 1, 0
PROMPTS = [[5, 9, 4], [7, 4], [12, 13, 14, 15, 4]]


@pytest.fixture
def pair(gpt2):
    """Models that agree now and then: the student is the teacher, a little disturbed."""
    student, teacher = gpt2(), gpt2()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return student, teacher


def test_acceptance_and_greedy_matches_by_hand(pair):
    student, teacher = pair
    found = draft_quality(student, teacher, PROMPTS, EOS, PAD, max_new_tokens=12, repeats=1)
    accepted, same = [], []
    for prompt, text in zip(PROMPTS, generate(teacher, PROMPTS, EOS, PAD, 12), strict=True):
        for place, token in enumerate(text):  # one token after the other, without a cache
            before = torch.tensor([[*prompt, *text[:place]]])
            with torch.no_grad():
                q, p = (model(before).logits[0, -1].double().softmax(-1) for model in (student, teacher))
            accepted.append(sum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            same.append(int(q.argmax()) == token)
    assert found.positions == len(accepted) > 12
    assert found.acceptance == pytest.approx(sum(accepted) / len(accepted), abs=1e-6)
    assert found.greedy == sum(same) / len(same) and 0 < found.greedy < 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_teachers_passes_are_those_that_generate_makes(pair, tokens, monkeypatch):
    student, teacher = pair
    found = draft_quality(student, teacher, PROMPTS, EOS, PAD, max_new_tokens=12, tokens=tokens, repeats=1)
    assert found.equal == 1.0
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student.generation_config.num_assistant_tokens = tokens
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    written = 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD}
        written += teacher.generate(ids, assistant_model=student, **options).shape[1] - len(prompt)
    # the last pass may be cut short by the limit; and an end of text is a token that is written
    assert abs(len(calls) - found.positions / found.tokens_a_pass) <= len(PROMPTS)
    assert written - found.positions in range(len(PROMPTS) + 1)


def drafted(same):
    """A text of tokens 7 at whose places the draft is right, or proposes 8."""
    nothing = torch.zeros(len(same))
    return DraftedText([7] * len(same), [7 if right else 8 for right in same], nothing, nothing, nothing)


def test_passes_by_hand():
    yes, no = True, False
    # γ = 2: two and the next; none and the next; one and the next; one, and the text is over
    text = [yes, yes, no, no, yes, no, yes]
    assert drafted(text).passes(2) == [3, 1, 2, 1]
    assert drafted([no] * 5).passes(4) == [1] * 5 and drafted([yes] * 10).passes(4) == [5, 5]
    assert drafted([yes] * 3).passes(9) == [3] and drafted([]).passes(1) == []
    with pytest.raises(ValueError, match="tokens=0 was asked"):
        drafted(text).passes(0)


def test_a_drafted_text_is_what_both_models_say_of_each_place(pair):
    student, teacher = pair
    texts = drafted_texts(student, teacher, PROMPTS, EOS, PAD, max_new_tokens=12)
    assert [text.tokens for text in texts] == generate(teacher, PROMPTS, EOS, PAD, 12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        for place, token in enumerate(text.tokens):
            before = torch.tensor([[*prompt, *text.tokens[:place]]])
            with torch.no_grad():
                q, p = (model(before).logits[0, -1].double().softmax(-1) for model in (student, teacher))
            assert text.probability[place] == pytest.approx(float(q[token]), abs=1e-6)
            assert text.teacher_probability[place] == pytest.approx(float(p[token]), abs=1e-6)
            assert text.proposed[place] == int(q.argmax()) and int(p.argmax()) == token
        assert (text.acceptance >= text.probability.min(text.teacher_probability) - 1e-6).all()
        assert sum(text.passes(3)) == len(text.tokens)


def test_an_empty_text_is_kept(pair):
    student, teacher = pair
    first = generate(teacher, PROMPTS, EOS, PAD, 12)[0][0]  # what now ends the first text at once
    texts = drafted_texts(student, teacher, PROMPTS, [EOS, first], PAD, max_new_tokens=12)
    assert texts[0].tokens == [] and texts[0].passes(2) == [] and len(texts) == len(PROMPTS)


def test_a_teacher_drafts_itself_perfectly_and_at_its_own_cost(gpt2):
    teacher, same = gpt2(), gpt2()
    before = teacher.generation_config, same.generation_config
    found = draft_quality(same, teacher, PROMPTS, EOS, PAD, max_new_tokens=10, tokens=4, repeats=2)
    assert found.acceptance == pytest.approx(1.0, abs=1e-6) and found.greedy == 1.0
    assert found.tokens_a_pass == found.positions / sum(-(-length // 5) for length in _lengths(teacher))
    assert found.sampled_tokens_a_pass == pytest.approx(5.0, abs=1e-4)
    assert found.cost > 0 and found.seconds > 0 and found.draft_seconds > 0
    assert (teacher.generation_config, same.generation_config) == before
    assert "acceptance 1.000, 100.0% of the teacher's greedy tokens" in str(found)


def _lengths(teacher):
    return [len(text) for text in generate(teacher, PROMPTS, EOS, PAD, 10) if text]


def test_several_ends_of_text(pair):
    student, teacher = pair
    text = generate(teacher, PROMPTS, EOS, PAD, 12)[0]
    ends = [EOS, text[4]]
    cut = generate(teacher, PROMPTS, ends, PAD, 12)
    assert cut[0] == text[: text.index(text[4])] and not any(end in one for one in cut for end in ends)
    found = draft_quality(student, teacher, PROMPTS, ends, PAD, max_new_tokens=12, repeats=1)
    assert found.positions == sum(map(len, cut))


def test_formulas_by_hand():
    found = DraftQuality(4, 10, 0.5, 0.6, 2.0, 0.25, seconds=3.0, draft_seconds=2.0, equal=1.0)
    assert found.sampled_tokens_a_pass == 1 + 0.5 + 0.25 + 0.125 + 0.0625
    assert found.expected_speedup == 1.0 and found.speedup == 1.5


def test_what_cannot_draft_is_refused_before_work(gpt2, monkeypatch):
    student, teacher = gpt2(vocab_size=35), gpt2(vocab_size=40)
    monkeypatch.setattr(type(teacher), "forward", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match=r"the student's vocabulary has 35 tokens, the teacher's 40.*one tokenizer"):
        draft_quality(student, teacher, PROMPTS, EOS, PAD)
    for name, value in (("tokens", 0), ("repeats", True), ("max_new_tokens", 2.5)):
        with pytest.raises(ValueError, match=f"{name}={value!r} was asked"):
            draft_quality(teacher, teacher, PROMPTS, EOS, PAD, **{name: value})
    with pytest.raises(ValueError, match=r"are 11, and the student has 10 positions"):
        draft_quality(gpt2(vocab_size=40, positions=10), teacher, PROMPTS, EOS, PAD, max_new_tokens=6)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=1))
    for other in (tiny("bert"), tiny("t5"), mamba):
        with pytest.raises(ValueError, match=r"the student is a \w+, with which transformers does not draft"):
            draft_quality(other, teacher, PROMPTS, EOS, PAD)
    with pytest.raises(ValueError, match="0 prompts"):
        draft_quality(teacher, teacher, [], EOS, PAD, max_new_tokens=9)
    with pytest.raises(ValueError, match="student is on meta, the teacher on cpu"):
        draft_quality(gpt2(vocab_size=40).to("meta"), teacher, PROMPTS, EOS, PAD, max_new_tokens=9)
