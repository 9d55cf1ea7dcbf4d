"""Numbers as a person reads them."""

from __future__ import annotations

# The longest time that one can ask for: gloo, nccl and timers count seconds, milliseconds or
# nanoseconds in 32 or 64 bits.
LONGEST_S = 1e9


def format_bytes(count: float) -> str:
    """Write a number of bytes with a decimal unit.

    Args:
        count: At least 0.

    Returns:
        Such as "512 B", "1.50 kB" or "2.35 TB": units are powers of 1,000.
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:,.2f} PB"


def format_time(seconds: float) -> str:
    """Write a short time with its unit.

    Args:
        seconds: At least 0.

    Returns:
        Such as "3.1 µs", "12.4 ms" or "45.7 s".
    """
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.95:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds:,.1f} s"


def format_flops(count: float) -> str:
    """Write a number of floating-point operations with a decimal prefix.

    Args:
        count: At least 0.

    Returns:
        Such as "512 FLOP", "1.50 MFLOP" or "2.35 TFLOP": prefixes are powers of 1,000.
    """
    value = float(count)
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.0f} FLOP" if not prefix else f"{value:.2f} {prefix}FLOP"
        value /= 1000
    return f"{value:,.2f} PFLOP"
