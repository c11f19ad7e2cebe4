"""Writes numbers of a data set as text, which is how a verifier gets a numeric answer.

| source                          | text                                                                            |
| ------------------------------- | ------------------------------------------------------------------------------- |
| JSON                            | the digits of the file: 1.10, 0.00001, 1e22, 18446744073709551616                |
| Parquet and Arrow, whole numbers | their digits                                                                    |
| decimals                        | as many places as the column has, without exponent                              |
| floats                          | the shortest decimal that reads back to the same value of the column's type,    |
|                                 | without exponent; a whole number has no point: 18, not 18.0                     |
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np


class Real(float):
    """A number that keeps the text it was written as."""

    text: str

    def __new__(cls, text: str) -> Real:
        number = super().__new__(cls, text)
        number.text = text
        return number


def from_float(value: float, bits: int) -> Real:
    """Text of a float of 16, 32 or 64 `bits`. Infinities and NaN are `inf`, `-inf` and `nan`."""
    exact = np.dtype(f"f{bits // 8}").type(value)
    return Real(np.format_float_positional(exact, unique=True, trim="-"))


def from_decimal(value: Decimal) -> Real:
    return Real(format(value, "f"))


def number_text(value: float) -> str:
    return value.text if isinstance(value, Real) else str(value)
