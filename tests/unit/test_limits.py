"""Caps have a range, and say which one is out of it."""

from __future__ import annotations

import pytest

from fastsplit.schema.limits import Limits


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("max_tensors", 0, "max_tensors: 0, expected an int from 1 to 9223372036854775807"),
        ("max_dims", 2**63, "max_dims: 9223372036854775808, expected an int from 1"),
        ("max_inflight", 2.5, "max_inflight: 2.5, expected an int"),
        ("max_metadata_nbytes", 4095, "max_metadata_nbytes: 4095, expected an int from 4096 to 4294967295"),
        ("max_metadata_nbytes", 2**32, "max_metadata_nbytes: 4294967296, expected an int from 4096 to 4294967295"),
        ("max_attrs", 15, "max_attrs: 15, expected an int from 16"),
    ],
)
def test_out_of_range(field: str, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Limits(**{field: value})


def test_least() -> None:
    Limits(4096, 1, 1, 1, 16, 1)
