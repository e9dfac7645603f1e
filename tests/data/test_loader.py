"""An epoch is a permutation; a batch depends on the seed and the step, not on who asks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastgpt.data import IGNORE_INDEX, Loader, ValidationSet, Windows, permute
from fastgpt.errors import InputError


@given(n=st.integers(1, 3000), key=st.integers())
@example(n=1, key=0)
@example(n=2, key=1)
@example(n=2501, key=2)  # just above a square: the most cells to walk past
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 1 << 40), key=st.integers(), data=st.data())
def test_permute_is_injective_and_within_any_range(n: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=50))
    images = permute(np.array(index, dtype=np.int64), n, key)
    assert images.dtype == np.int64
    assert len(set(images.tolist())) == len(index)
    assert all(0 <= image < n for image in images)


def test_permute_keeps_the_shape() -> None:
    index = np.arange(12)
    table = permute(index.reshape(3, 4), 12, 5)
    assert np.array_equal(table.reshape(-1), permute(index, 12, 5))
    assert permute(np.array(3), 12, 5) == table.reshape(-1)[3]


def test_permute_is_the_same_everywhere() -> None:
    """Recorded: a change here changes the batches of every run that is resumed."""
    assert permute(np.arange(10), 10, 0).tolist() == [4, 5, 7, 2, 9, 6, 1, 8, 0, 3]
    assert permute(np.array([0, 1, 1 << 39]), 1 << 40, 2**64 - 1).tolist() == [
        801511312987,
        293653372606,
        473335292763,
    ]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17])
def test_permute_is_fair(n: int) -> None:
    """Over many keys each index goes everywhere equally often: chi-square within 6 deviations of its mean."""
    keys = 3000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_permute_shuffles() -> None:
    """Neighbours part: distances between images of neighbours are those of a random order, n/3 on average."""
    n = 100_000
    order = permute(np.arange(n), n, 1)
    assert abs(np.abs(np.diff(order)).mean() - n / 3) < n / 100
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02


@pytest.mark.parametrize(("index", "n"), [([0], 0), ([0], (1 << 40) + 1), ([5], 5), ([-1], 5)])
def test_permute_refuses(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match=r"outside range|expected 1"):
        permute(np.array(index), n, 0)


VOCAB = 60000
sizes = st.lists(st.integers(1, 120), min_size=1, max_size=5)


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Shards in which every token is another: its value tells its place."""
    ends = np.cumsum([0, *sizes])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends)]


def loader(sizes: list[int], block_size: int, batch_size: int, seed: int = 0) -> Loader:
    return Loader(Windows(numbered(sizes), block_size, vocab_size=VOCAB), batch_size, seed=seed)


def validation(shards: list[np.ndarray], block_size: int, max_samples: int | None = None) -> ValidationSet:
    return ValidationSet(Windows(shards, block_size, vocab_size=VOCAB), max_samples=max_samples)


@given(sizes=sizes, block_size=st.integers(1, 20), seed=st.integers())
def test_an_epoch_has_every_window_once(sizes: list[int], block_size: int, seed: int) -> None:
    sizes[0] += block_size  # at least one window
    one = loader(sizes, block_size, 1, seed)
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for step in range(epoch * one.samples_per_epoch, (epoch + 1) * one.samples_per_epoch):
            x, y = one.batch(step)
            assert x.shape == y.shape == (1, block_size)
            assert x.dtype == y.dtype == np.int64
            assert np.array_equal(y, x + 1)  # the next token, and never across two shards ...
            shard = np.searchsorted(np.cumsum(sizes), x, side="right")
            assert (shard == np.searchsorted(np.cumsum(sizes), y, side="right")).all()
            seen.update(x.reshape(-1).tolist())
        assert set(seen.values()) == {1}  # ... no token is an input twice
        begin = 0
        for size in sizes:  # ... and of every shard as many are as fill blocks, without a gap
            inputs = sorted(token for token in seen if begin <= token < begin + size)
            assert len(inputs) == (size - 1) // block_size * block_size
            assert not inputs or inputs == list(range(inputs[0], inputs[0] + len(inputs)))
            begin += size


def test_every_token_is_reached_in_some_epoch() -> None:
    """The tiling shifts: 25 tokens are 2 windows of 10 + 1 and 4 left over, at either end or both."""
    one = loader([25], 10, 2)
    starts = {int(one.batch(epoch)[0].min()) for epoch in range(50)}
    assert starts == {0, 1, 2, 3, 4}
    assert {int(one.batch(epoch)[1].max()) for epoch in range(50)} == {20, 21, 22, 23, 24}


def test_orders_differ_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        x, _ = loader([1001], 10, 100, seed).batch(epoch)
        return tuple((x[:, 0] // 10).tolist())

    orders = {order(seed, epoch) for seed in (0, 1, -1) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(each) == list(range(100)) for each in orders)


@given(
    sizes=sizes,
    block_size=st.integers(1, 8),
    per_rank=st.integers(1, 6),
    world_size=st.sampled_from([1, 2, 8]),
    micro_batch_size=st.integers(1, 7),
    step=st.integers(0, 1000),
)
def test_ranks_and_micro_batches_make_up_the_same_global_batch(
    sizes: list[int], block_size: int, per_rank: int, world_size: int, micro_batch_size: int, step: int
) -> None:
    sizes[0] += block_size
    one = loader(sizes, block_size, per_rank * world_size)
    x, y = one.batch(step)
    ranks = [one.micro_batches(step, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {-(-per_rank // micro_batch_size)}
    assert np.array_equal(
        np.concatenate([part[0] for parts in zip(*ranks, strict=True) for part in parts]), x
    )
    assert np.array_equal(
        np.concatenate([part[1] for parts in zip(*ranks, strict=True) for part in parts]), y
    )
    for batches in ranks:
        rows = [len(part[0]) for part in batches]
        assert all(count == micro_batch_size for count in rows[:-1])
        assert 0 < rows[-1] <= micro_batch_size


@given(sizes=sizes, batch_size=st.integers(1, 300), step=st.integers(0, 100))
def test_a_batch_needs_the_step_alone(sizes: list[int], batch_size: int, step: int) -> None:
    """Resuming, or another batch size, walks through the same order; batches go across epochs."""
    sizes[0] += 5
    one = loader(sizes, 5, 1)
    whole = loader(sizes, 5, batch_size)
    x, _ = loader(sizes, 5, batch_size).batch(step)
    assert np.array_equal(whole.batch(step)[0], x)
    for row in {0, batch_size // 2, batch_size - 1}:
        assert np.array_equal(one.batch(step * batch_size + row)[0][0], x[row])


def test_epoch_of() -> None:
    one = loader([101], 10, 4)
    assert one.samples_per_epoch == 10
    assert [one.epoch_of(step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


def test_batches_can_be_written_to() -> None:
    """They become tensors: contiguous, and no view of the mapped file."""
    for array in loader([101], 10, 4).batch(0):
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_outside_the_vocabulary(rank: int) -> None:
    shards = [np.zeros(101, dtype=np.uint16), np.full(101, 50300, dtype=np.uint16)]
    windows = Windows(shards, 10, vocab_size=50257, names=["good.bin", "bad.bin"])
    broken = Loader(windows, 20, seed=0)
    with pytest.raises(InputError, match=r"bad\.bin holds token 50300, outside the vocabulary of 50257"):
        broken.micro_batches(0, 10, rank, 2)
    with pytest.raises(InputError, match="shard 1 holds token 50300"):
        next(ValidationSet(Windows(shards, 10, vocab_size=50257)).batches(20))


def test_the_last_token_of_the_vocabulary_is_in_it() -> None:
    shards = [np.array([0, 1, 2], dtype=np.uint16)]
    assert Loader(Windows(shards, 2, vocab_size=3), 1, seed=0).batch(0)[1].tolist() == [[1, 2]]
    with pytest.raises(InputError, match="holds token 2"):
        Loader(Windows(shards, 2, vocab_size=2), 1, seed=0).batch(0)


@pytest.mark.parametrize("shards", [[10], [10, 3], [1]])
def test_too_little_text(shards: list[int]) -> None:
    message = rf"text of {max(shards)} tokens is shorter than a window of block_size \+ 1 = 11"
    with pytest.raises(InputError, match=message):
        loader(shards, 10, 1)
    with pytest.raises(InputError, match=message):
        validation(numbered(shards), 10)


def test_just_enough_text() -> None:
    assert loader([11], 10, 3).batch(0)[0].shape == (3, 10)


def test_impossible_sizes() -> None:
    with pytest.raises(InputError, match="block_size is 0"):
        loader([100], 0, 1)
    with pytest.raises(InputError, match="batch_size is 0"):
        loader([100], 1, 0)
    with pytest.raises(InputError, match="micro_batch_size is 0"):
        loader([100], 1, 2).micro_batches(0, 0)
    with pytest.raises(InputError, match="batch_size 10 is not a multiple of the 8 processes: use 16"):
        loader([100], 1, 10).micro_batches(0, 1, 0, 8)
    with pytest.raises(InputError, match="max_samples is 0"):
        validation(numbered([100]), 10, max_samples=0)
    with pytest.raises(InputError, match="batch_size is 0"):
        next(validation(numbered([100]), 10).batches(0))


@given(sizes=sizes, block_size=st.integers(1, 20), batch_size=st.integers(1, 9))
def test_validation_reads_all_windows_in_order(sizes: list[int], block_size: int, batch_size: int) -> None:
    sizes[0] += block_size
    windows = validation(numbered(sizes), block_size)
    batches = list(windows.batches(batch_size))
    x = np.concatenate([x for x, _ in batches])
    starts = [
        shard[number * block_size]
        for shard in numbered(sizes)
        for number in range((shard.size - 1) // block_size)
    ]
    assert np.array_equal(x, np.array(starts)[:, None] + np.arange(block_size))
    assert all(np.array_equal(y, x + 1) for x, y in batches)
    assert len(windows) == len(x)
    assert all(len(x) == batch_size for x, _ in batches[:-1])


@given(total=st.integers(1, 200), limit=st.integers(1, 250))
def test_validation_windows_are_spread_evenly(total: int, limit: int) -> None:
    windows = validation(numbered([total * 3 + 1]), 3, max_samples=limit)
    chosen = np.concatenate([x for x, _ in windows.batches(1000)])[:, 0] // 3
    assert len(windows) == len(chosen) == min(total, limit)
    gaps = np.diff([*chosen, chosen[0] + total])
    assert chosen[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    again = np.concatenate([x for x, _ in windows.batches(7)])[:, 0] // 3
    assert np.array_equal(again, chosen)


@given(windows=st.integers(1, 30), world_size=st.integers(1, 6), batch_size=st.integers(1, 5))
def test_shares_of_the_validation_windows_are_equally_long_and_disjoint(
    windows: int, world_size: int, batch_size: int
) -> None:
    """Together they hold every window once; what fills up the shorter ones counts in no loss."""
    whole = validation([np.arange(3 * windows + 1, dtype=np.uint16)], 3)
    shares = [whole.share(rank, world_size) for rank in range(world_size)]
    batches = [list(share.batches(batch_size)) for share in shares]
    assert {len(share) for share in shares} == {-(-windows // world_size)}
    assert len({tuple(x.shape for x, _ in each) for each in batches}) == 1
    targets = np.concatenate([y for each in batches for _, y in each])
    counted = targets[targets[:, 0] != IGNORE_INDEX]
    assert sorted(counted[:, 0].tolist()) == [3 * window + 1 for window in range(windows)]
    assert (targets[targets[:, 0] == IGNORE_INDEX] == IGNORE_INDEX).all()
    assert all((x >= 0).all() for each in batches for x, _ in each)
