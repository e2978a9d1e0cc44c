"""The CRC-32 of bytes whose halves were looked at by different ranks."""

from __future__ import annotations

from functools import cache

POLYNOMIAL = 0xEDB88320
"""That of CRC-32, bits reflected, as zlib has it."""


def combine_crc32(first: int, second: int, second_length: int) -> int:
    """CRC-32 of A + B from those of A and B and the length of B in bytes: A's is multiplied by x^(8 length), modulo the
    polynomial (as in zlib's `crc32_combine`)."""
    return _multiply(_power(second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """a times b modulo the polynomial; the highest bit is the coefficient of x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _power(length: int) -> int:
    """x^(8 length) modulo the polynomial."""
    result, square = 1 << 31, 1 << 23  # x^0 and x^8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square, length = _multiply(square, square), length >> 1
    return result
