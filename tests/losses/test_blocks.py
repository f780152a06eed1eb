"""Blocks of the fused losses: their size can be asked and set, and who hands them out decides which of them are run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fakit.losses.attention import map_kl
from fakit.losses.fused.blocks import SIZES, Block, block_size, blocks, may_look, use_blocks
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.fused.streamed import streamed_map_kl
from fakit.losses.kl import kl


def test_sizes_are_asked_and_set_inside_alone():
    assert block_size("attention", "cpu") == SIZES["attention"][0] < block_size("attention", "cuda")
    with use_blocks(attention=300):
        with use_blocks(outputs=7):
            assert block_size("attention", "cuda") == 300 and block_size("outputs", "cpu") == 7
            with ThreadPoolExecutor() as pool:  # another thread's losses are not concerned
                assert pool.submit(block_size, "attention", "cpu").result() == SIZES["attention"][0]
        assert block_size("outputs", "cpu") == SIZES["outputs"][0]
    assert block_size("attention", "cpu") == SIZES["attention"][0]
    with pytest.raises(KeyError), use_blocks(attention=300):
        raise KeyError
    assert block_size("attention", "cpu") == SIZES["attention"][0]


def test_unknown_losses_and_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"loss 'features' has no blocks; choose one of attention, outputs"):
        block_size("features", "cpu")
    with pytest.raises(ValueError, match=r"attention=0: a block has at least one element"):
        use_blocks(attention=0).__enter__()


@pytest.mark.parametrize("rows", [1, 5, 6, 7])
def test_blocks_are_all_rows_in_order(rows):
    found = list(blocks(rows, 3, lambda end: 10 * end))
    assert [row for block in found for row in range(block.start, block.end)] == list(range(rows))
    assert found[-1] == Block(3 * ((rows - 1) // 3), rows, 10 * rows)


def test_attention_works_in_blocks_of_the_size_that_is_set():
    seen = []

    def hand_out(given):
        seen.append(given)
        return given

    query, key = torch.randn(2, 2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    with use_blocks(attention=2 * 4 * 12 * 5, hand_out=hand_out):  # batch × heads × keys × five queries
        loss = streamed_map_kl(query, key, key, query, causal=True)
    assert seen == [[Block(0, 5, 5), Block(5, 10, 10), Block(10, 12, 12)]]
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    maps = [
        (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(hidden, -1e30).softmax(-1)
        for q, k in ((query, key), (key, query))
    ]
    assert loss.item() == pytest.approx(map_kl(*maps).item(), rel=1e-5)


def test_a_loss_is_the_sum_over_the_blocks_that_it_is_handed():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 4, generator=generator), torch.randn(30, 4, generator=generator)
    ours, theirs = Head(hidden, weight), Head(hidden.flip(0), weight)
    parts = []
    for number in range(3):  # 256 tokens at a time, however small the block
        with use_blocks(outputs=1, hand_out=lambda every, number=number: every[number : number + 1]):
            parts.append(fused_outputs(ours, theirs)[1].item())
    with use_blocks(outputs=1):
        total = fused_outputs(ours, theirs)[1].item()
    assert min(parts) > 0 and sum(parts) == pytest.approx(total, rel=1e-5)


def test_blocks_do_not_keep_a_loss_from_being_compiled():
    query, key = torch.randn(2, 2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    query.requires_grad_()
    given = query, key, key.detach(), query.detach()
    compiled = torch.compile(lambda *x: streamed_map_kl(*x, causal=True), backend="eager", fullgraph=True)
    assert compiled(*given).item() == pytest.approx(streamed_map_kl(*given, causal=True).item(), rel=1e-6)


def test_small_divergences_are_summed_in_blocks_on_a_cpu_and_at_once_elsewhere():
    """What an accelerator would do can be run, and counted, on a CPU; the numbers are the same."""
    torch.manual_seed(0)
    teacher = torch.randn(40, 5000)
    student = teacher + 0.01 * torch.randn(40, 5000)
    handed_out = []

    def hand_out(every):
        handed_out.append(len(every))
        return every

    with use_blocks(hand_out=hand_out):
        in_blocks = kl(teacher, student)
    assert handed_out == [2]  # 2^17 elements each
    with use_blocks(accelerator=True, hand_out=hand_out):
        assert not may_look(teacher) and block_size("outputs", "cpu") == SIZES["outputs"][1]
        at_once = kl(teacher, student)
    assert handed_out == [2] and may_look(teacher)
    exact = torch.nn.functional.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    for found in (in_blocks, at_once):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
