"""Streaming and minibatch CKA (fakit.similarity.streaming): exact for any split, any offset, in constant memory."""

import pytest
import torch

from fakit.similarity import MinibatchCKA, StreamingCKA, cka, cka_matrix


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed, *rows):
    z = gaussian(seed, *rows, 4)
    students = [z @ gaussian(seed + i, 4, 6) + gaussian(seed + 10 + i, *rows, 6) for i in range(2)]
    teachers = [z @ gaussian(seed + 20 + i, 4, 9) + gaussian(seed + 30 + i, *rows, 9) for i in range(3)]
    return students, teachers


def streamed(stream, students, teachers, splits, mask=None):
    pieces = [[x.split(splits) for x in side] for side in (students, teachers)]
    masks = [None] * len(splits) if mask is None else mask.split(splits)
    for i in range(len(splits)):
        stream.update([x[i] for x in pieces[0]], [y[i] for y in pieces[1]], masks[i])
    return stream


SPLITS = [[60], [1, 59], [7, 1, 30, 22], [1] * 60]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_equals_all_rows_at_once(splits, shift, estimator):
    students, teachers = layers(0, 60)
    stream = streamed(StreamingCKA(), [x + shift for x in students], [y - shift for y in teachers], splits)
    expected = cka_matrix(students, teachers, estimator=estimator)
    # a shift of 1e4 costs the input itself 4 of its 16 digits
    torch.testing.assert_close(stream.matrix(estimator), expected, rtol=1e-10, atol=0)
    assert stream.n == 60


@pytest.mark.parametrize("splits", [[30], [1, 29], [10, 3, 17]])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_clusters_equal_cka_with_labels_whatever_the_split(splits, shift):
    students, teachers = layers(1, 30, 7)
    mask = torch.arange(7) < torch.arange(30)[:, None] % 7 + 1
    labels = torch.arange(30)[:, None].expand(30, 7)[mask]
    shifted = [[x + shift for x in side] for side in (students, teachers)]
    stream = streamed(StreamingCKA(clusters=True), *shifted, splits, mask)
    expected = [[cka(x[mask], y[mask], clusters=labels) for y in teachers] for x in students]
    torch.testing.assert_close(stream.matrix(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    assert stream.n == 30


@pytest.mark.parametrize("clusters", [False, True])
def test_padding_changes_nothing(clusters):
    students, teachers = layers(2, 12, 8)
    mask = torch.arange(8) < torch.tensor([8, 1, 3, 5, 8, 2, 4, 6, 7, 8, 0, 3])[:, None]
    short = StreamingCKA(clusters).update(students, teachers, mask).matrix()
    for junk in (100.0, torch.nan, torch.inf):
        padded = [
            [torch.cat([torch.where(mask[..., None], x, junk), torch.full((12, 5, x.shape[2]), junk)], 1) for x in side]
            for side in (students, teachers)
        ]
        wide = torch.cat([mask, torch.zeros(12, 5, dtype=torch.bool)], 1)
        torch.testing.assert_close(StreamingCKA(clusters).update(*padded, wide).matrix(), short, rtol=1e-12, atol=0)


def test_rows_of_tokens_are_the_valid_tokens():
    students, teachers = layers(2, 12, 8)
    mask = torch.arange(8) < torch.arange(12)[:, None] % 8 + 1
    expected = cka_matrix([x[mask] for x in students], [y[mask] for y in teachers])
    torch.testing.assert_close(StreamingCKA().update(students, teachers, mask).matrix(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(cka_matrix(students, teachers, mask), expected, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("error")
def test_sequences_of_one_token_are_rows():
    students, teachers = layers(3, 20)
    rows = StreamingCKA().update(students, teachers).matrix()
    torch.testing.assert_close(
        StreamingCKA(clusters=True).update(students, teachers).matrix(), rows, rtol=1e-10, atol=0
    )


def test_padding_kept_as_rows_would_invent_similarity():
    x, y = gaussian(0, 32, 16, 48), gaussian(1, 32, 16, 48)
    mask = (torch.arange(16) < 8).expand(32, 16)
    x, y = (torch.where(mask[..., None], z, 5.0) for z in (x, y))  # half the rows: the same padding vector
    assert StreamingCKA().update([x], [y]).matrix().item() > 0.9
    assert abs(StreamingCKA().update([x], [y], mask).matrix().item()) < 0.05


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("clusters", [False, True])
def test_float32_features_stay_close_whatever_the_shift(shift, clusters):
    students, teachers = layers(4, 500, 9)
    # the shift rounds the features themselves to 1e-3: that is what both are given
    students, teachers = [[(x + shift).float() for x in side] for side in (students, teachers)]
    mask = torch.arange(9) < torch.arange(500)[:, None] % 9 + 1
    exact = streamed(StreamingCKA(clusters, dtype=torch.float64), students, teachers, [500], mask).matrix()
    fast = streamed(StreamingCKA(clusters), students, teachers, [100] * 5, mask)
    assert fast._tokens.dtype == torch.float32
    torch.testing.assert_close(fast.matrix(), exact, rtol=2e-6, atol=2e-6)
    wide = [[x.double() for x in side] for side in (students, teachers)]
    torch.testing.assert_close(
        streamed(StreamingCKA(clusters), *wide, [7, 493], mask).matrix(), exact, rtol=1e-10, atol=0
    )


def test_float32_features_of_independent_data_are_0():
    x, y = (gaussian(seed, 6000, 64).float() + 100 for seed in (0, 1))
    value = streamed(StreamingCKA(), [x], [y], [1999, 4001]).matrix().item()
    assert value == pytest.approx(cka(x, y), abs=1e-6)
    assert abs(value) < 5e-3


def test_half_precision_features_are_taken_as_they_are():
    x, y = (gaussian(seed, 200, 8).bfloat16() for seed in (0, 1))
    y = y + x
    got = StreamingCKA().update([x], [y]).matrix().item()
    assert got == pytest.approx(cka(x.double(), y.double()), abs=2e-6)


@pytest.mark.parametrize("splits", [[5000], [2048, 2048, 904], [100] * 50, [3000, 2000], [2047, 1, 1, 2951]])
def test_blocks_of_rows_do_not_show(splits):
    """Rows wait until they fill a block; asking in between changes nothing."""
    students, teachers = layers(8, 5000)
    stream = StreamingCKA()
    for pieces in zip(*(x.split(splits) for x in students + teachers), strict=True):
        stream.update(pieces[:2], pieces[2:])
        if stream.n > 3:
            stream.matrix()
    torch.testing.assert_close(stream.matrix(), cka_matrix(students, teachers), rtol=1e-10, atol=0)


def test_wide_layers_take_symmetric_products_in_parts():
    x, y = gaussian(0, 300, 250), gaussian(1, 300, 201)
    y[:, :50] += x[:, :50]
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = StreamingCKA().update([x.to(dtype)], [y.to(dtype)]).matrix().item()
        assert got == pytest.approx(cka(x, y), rel=close)


def test_a_batch_may_be_changed_after_its_update():
    students, teachers = layers(9, 40)
    expected = cka_matrix(students, teachers)
    stream = StreamingCKA().update(students, teachers)
    for x in (*students, *teachers):
        x.fill_(7.0)
    torch.testing.assert_close(stream.matrix(), expected, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("where", [0, 1700, 2999])
@pytest.mark.parametrize("splits", [[3000], [1, 2999], [100] * 30])
def test_a_row_far_from_the_others_does_not_drown_them(size, where, splits):
    """Self-HSIC is a difference of sums in which the row's own ‖x‖⁴ stands:
    in float32 nothing of the others would be left.
    """
    x, noise = gaussian(0, 3000, 24).float(), gaussian(1, 3000, 24).float()
    y = x + 2 * noise
    x[where, 3] += size
    y[where // 2, 5] -= size
    exact = torch.tensor([[cka(x.double(), y.double()), cka(x.double(), noise.double())]], dtype=torch.float64)
    got = streamed(StreamingCKA(), [x], [y, noise], splits).matrix()
    torch.testing.assert_close(got, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("error")
def test_a_sequence_far_from_the_others_does_not_drown_them():
    x, noise = gaussian(0, 300, 5, 24).float(), gaussian(1, 300, 5, 24).float()
    y = x + 2 * noise
    x[7, 2, 3] += 1e5
    wide = streamed(StreamingCKA(clusters=True), [x.double()], [y.double(), noise.double()], [300])
    got = streamed(StreamingCKA(clusters=True), [x], [y, noise], [1, 299])
    torch.testing.assert_close(got.matrix(), wide.matrix(), rtol=2e-6, atol=2e-6)


def test_many_rows_far_from_the_others():
    """A massive activation at the first token of each sequence, as decoders have it:
    more than the half of some blocks.
    """
    x, y = gaussian(0, 5000, 16).float(), gaussian(1, 5000, 16).float()
    y += x
    for layer, size in ((x, 3e3), (y, 2e4)):
        layer[:1500, 2] += size
        layer[2048::40, 2] += size
    got = streamed(StreamingCKA(), [x], [y], [1000] * 5).matrix().item()
    assert got == pytest.approx(cka(x.double(), y.double()), rel=1e-5)


def test_memory_does_not_grow_with_rows():
    def held(value):
        """Elements of all tensors that a stream reaches."""
        if isinstance(value, torch.Tensor):
            return value.numel()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        inside = vars(value).values() if hasattr(value, "__dict__") else inside
        return sum(map(held, inside))

    stream = StreamingCKA()
    at_first = held(stream.update(*layers(0, 10)))
    for seed in range(60):
        stream.update(*layers(seed, 100))
    assert stream.n == 6010
    assert held(stream) <= at_first + 2 * (2 * 6 + 3 * 9)  # and the pilot, known from the second block on
    # 12 × 27 of pairs, 2 of 6 × 6 and 3 of 9 × 9, vectors, and a block of 5 layers and their numbers, for tokens and
    # means
    assert at_first < 2 * (2 * (12 * 27 + 2 * 36 + 3 * 81) + 2048 * (2 * 6 + 3 * 9 + 6))


def test_minibatch_of_one_batch_is_exact_and_of_many_close():
    students, teachers = layers(5, 400)
    exact = cka_matrix(students, teachers)
    torch.testing.assert_close(MinibatchCKA().update(students, teachers).matrix(), exact, rtol=1e-10, atol=0)
    many = streamed(MinibatchCKA(), students, teachers, [40] * 10)
    assert many.batches == 10
    torch.testing.assert_close(many.matrix(), exact, rtol=0, atol=0.03)


def test_minibatch_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    x, y = gaussian(0, 12, 5), gaussian(0, 12, 5) + gaussian(1, 12, 5)
    y[:6] *= 10
    got = streamed(MinibatchCKA(), [x], [y], [6, 6]).matrix().item()
    ratios = [cka(x[:6], y[:6]), cka(x[6:], y[6:])]
    assert abs(got - sum(ratios) / 2) > 1e-3


def test_a_constant_layer_is_nan_with_its_name():
    students, teachers = layers(6, 20)
    for flow in (StreamingCKA(), StreamingCKA(clusters=True), MinibatchCKA()):
        flow.update([students[0], torch.full((20, 3), 0.1)], teachers)
        with pytest.warns(RuntimeWarning, match="student layer 1 with itself is 0"):
            matrix = flow.matrix()
        assert matrix[1].isnan().all()
        assert not matrix[0].isnan().any()


def test_refusals():
    students, teachers = layers(7, 6, 5)
    with pytest.raises(ValueError, match="no valid token"):
        StreamingCKA().update(students, teachers, torch.zeros(6, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has shape \(5, 6\)"):
        StreamingCKA().update(students, teachers, torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="teacher layer 2 holds NaN"):
        StreamingCKA().update(students, [*teachers[:2], torch.full((6, 5, 9), torch.nan)])
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16.*float32 or torch.float64"):
        StreamingCKA(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="have no row"):
        StreamingCKA().update([torch.ones(0, 2)], [torch.ones(0, 3)])
    with pytest.raises(ValueError, match="at least 4 rows, found 0"):
        StreamingCKA().matrix()
    with pytest.raises(ValueError, match="debiased estimator only"):
        StreamingCKA(clusters=True).update(students, teachers).matrix("biased")
    stream = StreamingCKA().update(students, teachers)
    with pytest.raises(ValueError, match=r"widths \[6\].*first one had \[6, 6\]"):
        stream.update(students[:1], teachers)
    with pytest.raises(ValueError, match="at least 4 rows a batch, found 3"):
        MinibatchCKA().update([torch.ones(3, 2)], [torch.ones(3, 2)])
    with pytest.raises(ValueError, match=r"widths \[6, 5\].*first one had \[6, 6\]"):
        MinibatchCKA().update(students, teachers).update([students[0], students[1][..., :5]], teachers)
    with pytest.raises(ValueError, match="no batch yet"):
        MinibatchCKA().matrix()
