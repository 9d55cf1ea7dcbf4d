"""Checksums see every bit."""

import pytest
import torch

from distmuon.desync import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(300).to(dtype)
    before = checksum(tensor).item()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = 8 * tensor.element_size()
    for position in (0, 1, 77, 299):
        for bit in range(bits):
            word = 1 << bit if bit < bits - 1 else -(1 << bit)
            tensor.view(words)[position] ^= word
            assert checksum(tensor).item() != before, (position, bit)
            tensor.view(words)[position] ^= word
    assert checksum(tensor).item() == before


def test_swapped_elements_change_the_checksum() -> None:
    tensor = torch.arange(100, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[3], swapped[60] = tensor[60], tensor[3]
    assert checksum(tensor).item() != checksum(swapped).item()
