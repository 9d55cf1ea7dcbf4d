"""Which numbers a configuration may have: what float32 holds, and what texts can be written."""

from __future__ import annotations

from distmuon.update_rules import FLOAT32_MAX

# The least that any float32 with all its digits is; below it eps is 0 to AdamW on some devices.
_TINY = 2.0**-126
IN_FLOAT32 = f"> 0, from {_TINY:.2g} to {FLOAT32_MAX:.2g} as float32 has it"
# torch takes seeds of 64 bits, and of those above this only some with a sign.
LARGEST_SEED = 2**63 - 1
# Logits over less than this are no longer finite.
COLDEST = 1e-6


def in_float32(value: float) -> bool:
    """Whether a positive number is one in float32, too, and neither 0 nor infinite there."""
    return _TINY <= value <= FLOAT32_MAX


def is_text(value: str) -> bool:
    """Whether a text has bytes: half a surrogate pair, as undecodable arguments have, has none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
