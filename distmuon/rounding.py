"""Stochastic rounding to bfloat16, with random bits that depend on the element and the step alone.

A generator's state would depend on what else a rank holds. Here the bits are a hash of a seed, the
parameter's name, the number of its update and the element's place in it, so that any number of
ranks rounds alike, and a run that goes on from a checkpoint too.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.kernels import elementwise
from distmuon.kernels.device import on_device_of

_trusted: dict[torch.device, bool] = {}
# Elements at a time: on CPUs what stays in the cache, elsewhere what bounds the temporaries.
_CHUNK_NUMEL = {"cpu": 2**17}
_OTHER_CHUNK_NUMEL = 2**24
# Multipliers of 32-bit hashes with little bias, as signed integers.
# Source: https://github.com/skeeto/hash-prospector, "Two round functions".
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
_LOW_BITS = 0xFFFF


class Key(NamedTuple):
    """64 random bits of one parameter and step, as signed 32-bit integers."""

    first: int
    second: int


class Piece(NamedTuple):
    """A run of one parameter's elements in a stretch of a flat buffer.

    Attributes:
        start: First element in the stretch.
        stop: One past the last.
        first: Place of the first element in the parameter.
        key: Of the parameter and the step.
    """

    start: int
    stop: int
    first: int
    key: Key


def make_key(seed: int, name: str, step: int) -> Key:
    """Hash what the random bits of a parameter's elements have in common.

    Args:
        seed: The user's.
        name: The parameter's FQN, the same for any number of ranks.
        step: Number of its update.

    Returns:
        The key.
    """
    text = f"{seed}/{step}/{name}".encode()
    return Key(*struct.unpack("<ii", blake2b(text, digest_size=8).digest()))


def round_(out: Tensor, value: Tensor, pieces: Sequence[Piece]) -> None:
    """Round each element to one of its two neighbours, to the nearer one more often: no bias.

    Of the two bfloat16 numbers around a value it becomes the one away from zero with a probability
    that grows linearly from 0 at the other, in steps of 2^-16, as many as float32 has between
    them: the expected result is the value exactly. A value that bfloat16 has keeps its bits;
    infinities and NaNs stay what they are. Past bfloat16's largest number comes infinity.

    Nothing waits for a GPU.

    Args:
        out: bfloat16 [n], contiguous; overwritten where there are pieces.
        value: float32 [n], contiguous; between the pieces zero.
        pieces: In order; they do not overlap.

    Source: Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192.
    """
    if pieces and _takes(value):
        _round_by_kernel(out, value, pieces)
    else:
        _round_by_torch(out, value, pieces)


def _takes(value: Tensor) -> bool:
    """Whether a kernel is to round, which has been seen to draw the right bits."""
    if not elementwise.takes(value):
        return False
    if value.device not in _trusted:
        if value.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # the check waits for the device, which a graph cannot
        _trusted[value.device] = _check(value.device)
    return _trusted[value.device]


def _check(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(5000, generator=generator).to(device)
    pieces = [Piece(0, 17, 3, make_key(0, "a", 1)), Piece(17, 5000, 0, make_key(1, "b", 2))]
    kernel, plain = torch.zeros(2, len(value), dtype=torch.bfloat16, device=device)
    try:
        _round_by_kernel(kernel, value, pieces)
    except Exception as problem:
        # Whatever a compiler or a driver raises: torch's own operations do the same.
        text = f"raised {type(problem).__name__}: {problem}"
    else:
        _round_by_torch(plain, value, pieces)
        if torch.equal(kernel, plain):
            return True
        text = "draws other bits than torch's operations"
    warnings.warn(
        f"distmuon's kernel for stochastic rounding {text} on {device}; those are used there, "
        "slower and right." + see("gpu-kernels"),
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def _round_by_kernel(out: Tensor, value: Tensor, pieces: Sequence[Piece]) -> None:
    from distmuon.kernels.elementwise_triton import launch_round

    with on_device_of(value):
        for piece in pieces:
            launch_round(
                out[piece.start : piece.stop],
                value[piece.start : piece.stop],
                first=_signed(piece.first + piece.key.first),
                second=piece.key.second,
                factors=(_FIRST, _SECOND),
            )


def _round_by_torch(out: Tensor, value: Tensor, pieces: Sequence[Piece]) -> None:
    limit = _CHUNK_NUMEL.get(out.device.type, _OTHER_CHUNK_NUMEL)
    longest = min(limit, out.numel())
    places = torch.arange(longest, dtype=torch.int32, device=out.device)
    for chunk in _chunks(pieces, longest):
        span = slice(chunk[0].start, chunk[-1].stop)
        exact = value[span]
        bits = _random_bits(chunk, places)
        # Bits 0 to 15 are what bfloat16 lacks. The sum carries into bit 16, and so to the next
        # number away from zero, with the probability that they stand for.
        rounded = bits.add_(exact.view(torch.int32)).bitwise_and_(~_LOW_BITS).view(torch.float32)
        # A carry would make an infinity or a number of a NaN; the zeros between pieces have none.
        out[span].copy_(torch.where(exact.isfinite(), rounded, exact))


def _random_bits(chunk: Sequence[Piece], places: Tensor) -> Tensor:
    """16 random bits for each element from the first piece to the last, int32."""
    start = chunk[0].start
    bits = places.new_zeros(chunk[-1].stop - start)
    # One operation for each piece twice, all others for the chunk: a model's vectors are short.
    spans = [(bits[p.start - start : p.stop - start], p) for p in chunk]
    for part, piece in spans:
        torch.add(places[: len(part)], _signed(piece.first + piece.key.first), out=part)
    _mix_(bits, 16, _FIRST)
    for part, piece in spans:
        part.bitwise_xor_(piece.key.second)
    _mix_(bits, 15, _SECOND)
    return bits.bitwise_right_shift_(16).bitwise_and_(_LOW_BITS)


def _mix_(bits: Tensor, shift: int, multiplier: int) -> None:
    # The shift of signed integers repeats the sign, which the mask takes away: otherwise different
    # numbers would be mapped to one. Products and sums wrap around, as integers' in torch do.
    bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)


def _signed(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def _chunks(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces, cut where need be, over at most `limit` elements."""
    chunk: list[Piece] = []
    for piece in pieces:
        for start in range(piece.start, piece.stop, limit):
            stop = min(start + limit, piece.stop)
            if chunk and stop - chunk[0].start > limit:
                yield chunk
                chunk = []
            chunk.append(Piece(start, stop, piece.first + start - piece.start, piece.key))
    if chunk:
        yield chunk
