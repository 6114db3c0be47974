"""Digests of rows: every bit counts, zeros at the end do not, and both ways of making them agree on what is equal."""

import pytest
import torch

from fastpeft.caching.digest import _bytes_of_rows, multilinear, row_digests

WAYS = {"host": row_digests, "device": lambda data: multilinear(_bytes_of_rows(data))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_every_element_counts(way, dtype):
    digests = WAYS[way]
    data = (torch.rand(3, 7, 501, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    before = digests(data)
    assert len(set(before)) == 3 or dtype == torch.bool
    assert digests(data.transpose(1, 2).contiguous().transpose(1, 2)) == before  # strided
    assert digests(data[1:]) == before[1:]
    for place in (0, 1, 500, 501, 7 * 501 - 1):
        changed = data.clone()
        changed[1].view(-1)[place] = changed[1].view(-1)[place].logical_not() if dtype == torch.bool else changed[1].view(-1)[place] + 1
        assert [a == b for a, b in zip(digests(changed), before)] == [True, False, True]
    swapped = data.clone()
    swapped[1, 0], swapped[1, 1] = data[1, 1], data[1, 0]
    assert torch.equal(swapped, data) or digests(swapped)[1] != before[1]


@pytest.mark.parametrize("way", WAYS)
def test_zeros_at_the_end_do_not_count_and_those_before_do(way):
    digests = WAYS[way]
    data = torch.randn(2, 5000)
    padded = torch.nn.functional.pad(data, (0, 7000))
    assert digests(padded) == digests(data)
    assert digests(torch.nn.functional.pad(data, (1, 0))) != digests(data)
    assert len(digests(torch.empty(0, 3))) == 0 and digests(torch.zeros(2, 0)) == digests(torch.zeros(2, 0))
    assert digests(torch.tensor([[1.0, 2.0]], dtype=torch.complex64)) != digests(torch.tensor([[1.0, 2.0j]]))
