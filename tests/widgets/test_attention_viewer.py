"""The attention viewer without a browser: bytes, masks, links, what is sent, what is refused."""

import base64
import doctest
import json
import sys
import zlib

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fakit import LayerMap, Trace, capture
from fakit.similarity import attention_rollout, head_distance, match_heads
from fakit.widgets.attention.source import decode, encode
from fakit.widgets.attention.viewer import attention_viewer

TOKENS = ["[CLS]", "the", "film", "was", "fine", "[SEP]", "[PAD]", "[PAD]", "[PAD]", "[PAD]"]
MASK = torch.tensor([[True] * 6 + [False] * 4, [True] * 4 + [False] * 6])
SPECIAL = torch.tensor([[token == "[SEP]" for token in TOKENS]] * 2)


def random_maps(layers: int, heads: int, seed: int, mask=MASK, scale: float = 2.0) -> torch.Tensor:
    """(L, B, H, T, T), rows sum to 1 over the keys that are tokens."""
    length = mask.shape[1]
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(layers, len(mask), heads, length, length, generator=generator)
    return scores.masked_fill(~mask[:, None, None], -1e9).softmax(-1)


TEACHER, STUDENT = random_maps(6, 4, 0), random_maps(3, 4, 1)


def two(**options):
    given = {"layer_map": LayerMap.uniform(3, 6), "mask": MASK, "special": SPECIAL} | options
    return attention_viewer(TEACHER, STUDENT, [TOKENS, TOKENS], **given)


def size(viewer) -> int:
    """Bytes of the widget's state as it goes to the page."""
    state = viewer.get_state()
    return sum(len(v) if isinstance(v, bytes) else len(json.dumps(v, default=str)) for v in state.values())


def state_of(path):
    """What a written file holds."""
    return json.loads(path.read_text().split('id="state">')[1].split("</script>")[0])


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


# --- what is sent ---


@pytest.mark.parametrize("fine", [True, False])
def test_bytes_keep_a_map_to_a_255th_and_masked_cells_apart_from_zero(fine):
    maps = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    maps[0, 3, 1] = 0.0
    found = decode(encode(maps, visible, fine), heads=3)
    assert np.isnan(found[:, ~visible.numpy()]).all() and found[0, 3, 1] == 0
    assert np.abs(found - maps.numpy())[:, visible.numpy()].max() <= 1 / 255


def test_a_scale_a_head_keeps_faint_heads():
    faint = torch.full((1, 4, 4), 0.25 / 60) * torch.arange(1.0, 5.0)
    seen = torch.ones(4, 4, dtype=torch.bool)
    assert np.allclose(decode(encode(faint, seen), 1), faint, atol=0.02 / 508)
    assert not np.allclose(decode(encode(faint, seen, fine=False), 1), faint, atol=0.02 / 508)


def test_only_the_layer_pair_and_the_sequence_looked_at_are_sent():
    viewer = two()
    length = len(viewer.shown["tokens"])
    assert length == 8  # six tokens and two cells of padding
    assert len(viewer.teacher_page) == len(viewer.student_page) == 4 * (4 + length**2)
    for layer, sequence in ((6, 0), (3, 1)):
        viewer.teacher_layer, viewer.sequence = layer, sequence
        shown = len(viewer.shown["tokens"])
        expected = TEACHER[layer - 1, sequence, :, :shown, :shown]
        found = decode(viewer.teacher_page, 4)
        valid = MASK[sequence, :shown]
        assert np.isnan(found[:, :, ~valid]).all() and np.isnan(found[:, ~valid]).all()
        both = (valid[:, None] & valid).numpy()
        assert np.abs(found - expected.numpy())[:, both].max() <= 1 / 255


def test_thumbnails_are_small_and_hold_every_head():
    long = torch.ones(1, 64, dtype=torch.bool)
    viewer = attention_viewer(random_maps(2, 3, 0, long), tokens=[str(i) for i in range(64)])
    thumbs = np.frombuffer(viewer.teacher_thumbs, np.uint8).reshape(2, 3, 20, 20)
    first = random_maps(2, 3, 0, long)[0, 0, 1]
    edges = np.linspace(0, 64, 21).astype(int)
    largest = first[edges[4] : edges[5], edges[7] : edges[8]].max().sqrt()
    assert thumbs[0, 1, 4, 7] == round(254 * float(largest))


def softmax(draw):
    return torch.randn(12, 1, 12, 128, 128, generator=draw).softmax(-1)


def exponential(draw):
    """Rows that sum to 1 and have the largest entropy that such rows have."""
    values = torch.empty(12, 1, 12, 128, 128).exponential_(generator=draw)
    return values / values.sum(-1, keepdim=True)


def noise(draw):
    """No attention: every byte as often as every other."""
    return torch.randint(0, 255, (12, 1, 12, 128, 128), generator=draw) / 254


@pytest.mark.parametrize(("maps", "rounded"), [(softmax, 1 / 508), (exponential, 1 / 508), (noise, 1 / 6)])
def test_a_viewer_of_12_by_12_by_128_weighs_at_most_3_mb(maps, rounded, tmp_path):
    draw = torch.Generator().manual_seed(0)
    viewer = attention_viewer(
        maps(draw), maps(draw), [f"token{i}" for i in range(128)], layer_map=LayerMap.uniform(12, 12)
    )
    still = len(viewer._repr_mimebundle_()[0]["image/svg+xml"])
    path = viewer.to_html(tmp_path / "viewer.html")
    assert 100_000 < size(viewer) + still + path.stat().st_size <= 3_000_000
    held = state_of(path)
    assert held["rounded"] <= rounded
    found = decode(unpacked(held["pages"]["student/heads/12/false"]), 12)
    assert np.abs(found - viewer.page("student", 12, "heads", False)[0].numpy()).max() <= held["rounded"] + 1e-6


# --- what is chosen ---


def test_selection_is_settable_and_observable():
    viewer, seen = two(), []
    viewer.observe(lambda change: seen.append((change.name, change.new)), ["teacher_layer", "teacher_head", "cursor"])
    viewer.teacher_layer = 4
    viewer.teacher_head = 2
    viewer.cursor = (1, 2)
    assert [entry for entry in seen if entry[0] != "cursor"] == [("teacher_layer", 4), ("teacher_head", 2)]
    assert seen[-1] == ("cursor", (1, 2))
    assert viewer.maps["teacher"][1, 2] == pytest.approx(float(TEACHER[3, 0, 2, 1, 2]))
    assert viewer.sentence.startswith(f"the → film: teacher {float(TEACHER[3, 0, 2, 1, 2]):.3f}, student ")


def test_a_message_of_the_page_chooses_layer_and_head_at_once():
    viewer = two()
    viewer.set_state({"teacher_layer": 2, "teacher_head": 3})
    assert (viewer.teacher_layer, viewer.teacher_head, viewer.student_layer) == (2, 3, 1)
    assert viewer.shown["layers"] == [2, 1]


def test_another_sequence_puts_the_cursor_where_the_two_differ_most():
    viewer = two()
    viewer.cursor = (5, 5)  # padding in the second sequence
    viewer.sequence = 1
    gap = np.abs(viewer.maps["student"] - viewer.maps["teacher"])
    assert gap[viewer.cursor] == np.nanmax(gap)


def test_a_line_break_is_a_sign_in_every_text():
    viewer = attention_viewer(TEACHER, tokens=[["\n", *TOKENS[1:]], TOKENS], mask=MASK)
    viewer.cursor = (0, 1)
    assert viewer.sentence.startswith("⏎ → the: teacher") and viewer.shown["tokens"][0] == "⏎"


def test_linked_a_teacher_head_chooses_its_best_match():
    viewer = two()
    viewer.teacher_layer = 4
    assert viewer.student_layer == 2  # as the map has it
    match = match_heads(head_distance(STUDENT[1], TEACHER[3], MASK))
    for student_head, teacher_head in match.pairs:
        viewer.teacher_head = teacher_head
        assert viewer.student_head == student_head
    assert viewer.shown["match"] == [(*p, d) for p, d in zip(match.pairs, match.distances, strict=True)]
    viewer.teacher_head = None
    assert viewer.student_head is None


def test_not_linked_the_student_stays():
    viewer = two()
    viewer.linked = False
    viewer.student_layer, viewer.student_head = 1, 3
    viewer.teacher_layer, viewer.teacher_head = 2, 0
    assert (viewer.student_layer, viewer.student_head) == (1, 3)
    viewer.linked = True
    assert viewer.student_head == dict((t, s) for s, t in viewer.matching.pairs)[0]


def test_a_head_that_the_new_layer_has_not_becomes_its_last():
    maps = {1: TEACHER[0], 2: TEACHER[1, :, :2]}
    viewer = attention_viewer(maps, tokens=[TOKENS, TOKENS], mask=MASK)
    viewer.teacher_layer = 1
    viewer.teacher_head = 3
    viewer.teacher_layer = 2
    assert viewer.teacher_head == 1


def test_the_mean_over_heads():
    viewer = two()
    viewer.teacher_head = None
    assert np.allclose(viewer.maps["teacher"][:6, :6], TEACHER[5, 0, :, :6, :6].mean(0))
    assert viewer.name("teacher") == "teacher, T6 mean over heads"


def test_sinks_left_out_rows_are_renormalized():
    viewer = two()
    viewer.teacher_head = 1
    viewer.without_sinks = True
    assert viewer.shown["sinks"] == [0, 5] and viewer.shown["without_sinks"]
    expected = TEACHER[5, 0, 1, :6, 1:5] / TEACHER[5, 0, 1, :6, 1:5].sum(-1, keepdim=True)
    assert np.allclose(viewer.maps["teacher"][:6, 1:5], expected, atol=1e-6)
    assert np.isnan(viewer.maps["teacher"][:, [0, 5]]).all()
    sent = decode(viewer.teacher_page, 4)[1]
    assert np.allclose(np.nansum(sent[:6], -1), 1, atol=0.01) and np.isnan(sent[:, 0]).all()


@pytest.mark.parametrize("order", [("sequence", "without_sinks"), ("without_sinks", "sequence")])
@pytest.mark.parametrize("student", [STUDENT, None], ids=["both", "teacher"])
def test_a_sequence_of_sinks_alone_says_so_without_them_and_is_whole_again_with_them(order, student, tmp_path):
    mask = torch.stack([MASK[0], torch.arange(10) < 2])
    special = torch.stack([SPECIAL[0], torch.arange(10) < 2])
    tokens = [TOKENS, ["[CLS]", "[SEP]", *["[PAD]"] * 8]]
    viewer = attention_viewer(TEACHER, student, tokens, mask=mask, special=special)
    for name in order:
        setattr(viewer, name, 1)
    said = "Without its sinks ([CLS] [SEP]) nothing is left of this sequence: no token looks at any other."
    assert viewer.sentence == said and viewer.error == ""
    assert np.isnan(decode(viewer.teacher_page, 4)).all() and viewer.figure is None
    bundle, _ = viewer._repr_mimebundle_()
    assert bundle["text/plain"] == said and "image/svg+xml" not in bundle
    assert said in viewer.to_html(tmp_path / "viewer.html").read_text()
    viewer.without_sinks, viewer.cursor = False, (0, 0)
    assert viewer.sentence.startswith("[CLS] → [CLS]: teacher") and "<svg" in viewer.figure.svg()


def test_rollout_is_that_of_the_kit():
    viewer = two()
    viewer.teacher_layer = 4
    viewer.view = "rollout"
    expected = attention_rollout(list(TEACHER[:4]), MASK)[0]
    assert np.allclose(viewer.maps["teacher"][:6, :6], expected[:6, :6], atol=1e-6)
    assert np.nanmax(np.abs(decode(viewer.teacher_page, 1)[0] - viewer.maps["teacher"])) <= 1 / 255
    assert viewer.name("student") == "student, through S2"


def test_rollout_without_all_layers_says_which_are_missing():
    viewer = attention_viewer({2: TEACHER[1], 4: TEACHER[3]}, tokens=[TOKENS, TOKENS], mask=MASK)
    with pytest.raises(ValueError, match=r"every layer from 1; the teacher's \[1, 3\] are missing"):
        viewer.view = "rollout"
    assert viewer.view == "heads" and "[1, 3] are missing" in viewer.spec["no_rollout"]


def test_left_padding_is_shown_where_it_is():
    viewer = attention_viewer(TEACHER[:, :1].flip(-1, -2), tokens=TOKENS[::-1], mask=MASK[0].flip(0))
    assert viewer.shown["start"] == 2 and viewer.shown["tokens"] == TOKENS[::-1][2:]
    viewer.cursor = (4, 5)
    assert viewer.sentence.startswith("[SEP] → fine: teacher")


# --- traces ---


def test_traces_of_an_encoder_show_its_maps():
    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    teacher = BertModel(BertConfig(num_hidden_layers=2, **config)).eval()
    batch = {"input_ids": torch.arange(20).reshape(2, 10), "attention_mask": MASK.long()}
    with torch.no_grad():
        trace = capture(teacher, batch, attentions=[1, 2])
    viewer = attention_viewer(trace, trace, [TOKENS, TOKENS], layer_map=LayerMap([(1, 1), (2, 2)]))
    viewer.sequence = 1
    assert np.allclose(viewer.maps["teacher"][:4, :4], trace.attention_maps(2)[1, 0, :4, :4], atol=1e-6)
    assert np.isnan(viewer.maps["teacher"][4:]).all()
    assert viewer.matching.mean_distance == pytest.approx(0, abs=1e-6)


def test_a_decoder_with_grouped_keys_hides_the_future_and_names_its_groups():
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=16,
        vocab_size=30,
    )
    with torch.no_grad():
        trace = capture(
            LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(12).reshape(1, 12)}, attentions=[1, 2]
        )
    viewer = attention_viewer(trace, tokens=[str(i) for i in range(12)])
    assert viewer.spec["teacher"]["layers"] == [[1, 4, 2], [2, 4, 2]]  # layer, heads, heads of keys
    future = ~np.tril(np.ones((12, 12), bool))
    assert np.isnan(viewer.maps["teacher"][future]).all() and np.isfinite(viewer.maps["teacher"][~future]).all()
    assert (decode(viewer.teacher_page, 4)[:, 0, 0] == 1).all()
    viewer.cursor = (2, 5)
    assert viewer.sentence == "2 → 5: masked, no data."


# --- stills, files, failures ---


def test_the_display_carries_a_picture_and_a_sentence():
    bundle, _ = two()._repr_mimebundle_()
    assert bundle["image/svg+xml"].startswith("<?xml") or "<svg" in bundle["image/svg+xml"]
    assert "teacher, T6 head 0" in bundle["image/svg+xml"] and "→" in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_teacher_alone_has_one_map_and_no_student():
    viewer = attention_viewer(TEACHER, tokens=[TOKENS, TOKENS], mask=MASK)
    assert viewer.sides == ["teacher"] and viewer.student_page == b"" and viewer.student_layer is None
    assert "student" not in viewer._repr_mimebundle_()[0]["text/plain"]
    (drawn,) = [trace for trace in viewer.figure.plotly.data if trace.type == "heatmap"]
    assert np.allclose(drawn.z[:6, :6], TEACHER[5, 0, 0, :6, :6]) and np.isnan(drawn.z[7]).all()
    with pytest.raises(ValueError, match="shows no student"):
        viewer.student_layer = 1


def test_the_file_holds_every_map_of_the_sequence_and_asks_for_nothing(tmp_path):
    viewer = two()
    text = viewer.to_html(tmp_path / "viewer.html").read_text()
    state = json.loads(text.split('id="state">')[1].split("</script>")[0].replace("<\\/", "</"))
    layers = 6 + 3
    assert len(state["pages"]) == layers * 2 * 2  # heads and rollout, with sinks and without
    assert {"1/2", "2/4", "3/6"} <= set(state["matches"])
    assert "http://" not in text and "https://" not in text and "import " not in text.split("<script")[2]


def test_a_tight_limit_costs_precision_first_then_the_maps_without_sinks_then_levels(tmp_path):
    viewer, sizes, held = two(), [], []
    for _ in range(4):
        path = viewer.to_html(tmp_path / "viewer.html", limit=sizes[-1] - 1 if sizes else 10**6)
        sizes.append(path.stat().st_size)
        held.append(state_of(path))
    assert [len(found["pages"]) for found in held] == [36, 36, 18, 18]
    assert [found["rounded"] for found in held] == [0, 1 / 508, 1 / 508, 1 / 254]
    scales = [np.frombuffer(unpacked(found["pages"]["teacher/heads/1/false"]), "<f4", 4) for found in held]
    assert (scales[0] < 1).any() and [set(found) for found in scales[1:]] == [{1}, {1}, {2}]


def test_a_token_cannot_end_the_files_script(tmp_path):
    tokens = ["</script><script>alert(1)</script>", "<!--", *TOKENS[2:]]
    text = attention_viewer(TEACHER, tokens=[tokens] * 2, mask=MASK).to_html(tmp_path / "viewer.html").read_text()
    assert "alert(1)</script>" not in text and "<!--" not in text


def test_a_file_over_the_limit_says_by_how_much(tmp_path):
    with pytest.raises(
        ValueError, match=r"sequence 0 \(8 tokens\) take [\d,]+ bytes, the limit is 1,000: .*raise limit"
    ):
        two().to_html(tmp_path / "viewer.html", limit=1000)
    with pytest.raises(ValueError, match=r"as '\.pdf': use \.html"):
        two().to_html(tmp_path / "viewer.pdf")
    assert not list(tmp_path.iterdir())


def test_a_failure_is_shown_and_raised_and_passes():
    broken = TEACHER.clone()
    broken[2, 1, 3, 0, 0] = float("nan")
    viewer = attention_viewer(broken, tokens=[TOKENS, TOKENS], mask=MASK)
    with pytest.raises(ValueError, match="teacher's layer 3 holds nan in head 3 of sequence 1: attention after"):
        viewer.sequence = 1
    assert "layer 3 holds nan" in viewer.error and viewer.teacher_page == b""
    viewer.sequence = 0
    assert viewer.error == "" and len(viewer.teacher_page) and len(viewer.teacher_thumbs)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: attention_viewer((), tokens=TOKENS), r"teacher's attention is empty: sdpa.*capture\(model, batch"),
        (lambda: attention_viewer(Trace(), tokens=TOKENS), "teacher's attention is empty"),
        (lambda: attention_viewer((None, None), tokens=TOKENS), "layer 1 is None"),
        (lambda: attention_viewer("maps", tokens=TOKENS), "attention is a str; give a Trace"),
        (lambda: attention_viewer(TEACHER[0, 0, 0], tokens=TOKENS), r"shape \(10,\); expected \(H, T, T\)"),
        (lambda: attention_viewer(TEACHER[..., :5], tokens=TOKENS), "10 queries × 5 keys"),
        (lambda: attention_viewer({1: TEACHER[0], 2: TEACHER[0, :, :, :5, :5]}, tokens=TOKENS), "different sequences"),
        (
            lambda: attention_viewer(TEACHER, STUDENT[..., :9, :9], [TOKENS] * 2),
            "teacher looked at 2 sequences of 10 tokens, the student at 2 of 9: give both models the same batch",
        ),
        (lambda: attention_viewer(TEACHER, tokens=TOKENS), r"found tokens for 1 of \[10\]"),
        (lambda: attention_viewer(TEACHER, tokens=[TOKENS, TOKENS[:6]]), r"found tokens for 2 of \[6, 10\]"),
        (lambda: two(mask=MASK[:, :8]), r"mask has shape \(2, 8\); the teacher's maps need \(2, 10\)"),
        (lambda: two(mask=MASK & False), "no token: True in the mask marks the tokens"),
        (lambda: two(special=SPECIAL[0]), r"special has shape \(1, 10\)"),
        (lambda: two(layer_map=LayerMap.uniform(3, 9)), r"names teacher layers \[9\].*\[1, 2, 3, 4, 5, 6\]"),
        (
            lambda: attention_viewer(TEACHER.log(), tokens=[TOKENS] * 2, mask=MASK),
            r"layer 6 holds -\d.* after the softmax",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_named(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize(
    ("trait", "value", "message"),
    [
        ("teacher_layer", 7, "teacher_layer = 7; this viewer has 1, 2, 3, 4, 5, 6"),
        ("student_head", 4, "student_head of layer 3 = 4; this viewer has 0 to 3"),
        ("sequence", 2, "sequence = 2; this viewer has 0 to 1"),
        ("cursor", (0, 8), "position = 8; this viewer has 0 to 7"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_and_nothing_changes(trait, value, message):
    viewer = two()
    before = getattr(viewer, trait)
    with pytest.raises(ValueError, match=message):
        setattr(viewer, trait, value)
    assert getattr(viewer, trait) == before and viewer.error == ""


def test_the_example_of_the_docstring_runs():
    module = sys.modules[attention_viewer.__module__]  # by its name one finds the function
    assert doctest.testmod(module, extraglobs={"torch": torch}) == (0, 4)
