"""Raw replies of scripts, read: Lua has flat lists, texts of numbers and bitmaps."""

from typing import Any


def rows(flat: list[Any], width: int) -> list[tuple[Any, ...]]:
    """`[a, 1, b, 2] → [(a, 1), (b, 2)]` for a width of 2."""
    return list(zip(*(flat[place::width] for place in range(width)), strict=True))


def numbers(text: bytes | str) -> tuple[int, ...]:
    """`b"3 4 7" → (3, 4, 7)`."""
    return tuple(int(part) for part in text.split())


def bits(bitmap: bytes) -> frozenset[int]:
    """Indices of the set bits; Redis counts from the most significant bit of the first byte."""
    return frozenset(8 * place + bit for place, byte in enumerate(bitmap) if byte for bit in range(8) if byte & (0x80 >> bit))
