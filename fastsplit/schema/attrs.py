"""Attributes of a message: their values in Python's own types, and the part of them that belongs to its shape.

Rules. A value that cannot be sent is a SettingError that names the attribute, raised before anything is sent; so is an
exception of the value's own methods. A value is converted once, and only the converted value is used afterwards.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import LocalProtocolError, SettingError, shown
from . import message_generated as gen

__all__ = [
    "Packed",
    "as_dict",
    "call_attrs",
    "check_names",
    "check_texts",
    "is_unicode",
    "min_nbytes",
    "number_error",
    "split",
]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class Packed(NamedTuple):
    """A list of floats or bools as bytes of a message. As tuples, (1, 0), (1.0, -0.0) and (True, False) are equal."""

    kind: int
    data: bytes


def as_dict(field: str, attrs: Any) -> dict[Any, Any]:
    """A copy of the mapping `attrs`. Raises SettingError, which names `field`, if it is no mapping."""
    expected = "expected a dict or another mapping of names to values"
    try:
        if isinstance(attrs, Mapping):
            return dict(attrs)
    except Exception as error:
        raise SettingError(f"{field}: {shown(attrs)}, {expected}: {shown(error)}") from error
    raise SettingError(f"{field}: {shown(attrs)}, {expected}")


def call_attrs(attrs: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """A call's attributes, from the argument `attrs` and from keywords.

    Raises SettingError if `attrs` is no mapping, or a name is in both.
    """
    given = as_dict("attrs", attrs)
    for name in given:
        if name in keywords:
            raise SettingError(f"attribute {shown(name)}: in attrs and as a keyword, expected once")
    given.update(keywords)
    return given


def check_names(op: str, names: Iterable[object]) -> None:
    """Raises SettingError for a name that no attribute can have."""
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise SettingError(f"{op!r}: an attribute named {shown(name)}, expected a string that is not empty")
        text = str.__str__(name)
        if text in seen:
            raise SettingError(f"{op!r}: two attributes named {shown(name)}, expected each once")
        seen.add(text)
        if not is_unicode(text):
            raise SettingError(f"{op!r}: an attribute named {shown(name)}, expected valid Unicode")


def split(attrs: Mapping[str, Any], typed: bool) -> tuple[tuple[Any, ...], list[int], list[float]]:
    """The attributes' signature, which belongs to the message's shape, and their ints (with the bools) and floats.

    The signature has the type of each number and the value of anything else; a list is a tuple or Packed in it.
    `typed`: whether bools stay bools, and lists of floats and of bools can be sent. Raises SettingError.
    """
    signature: list[Any] = []
    ints: list[int] = []
    floats: list[float] = []
    for name, value in attrs.items():
        kind = type(value)
        if not (kind is int or kind is float or kind is str or kind is bytes or (typed and kind is bool)):
            value = _plain(name, value, typed)
            kind = type(value)
        if kind is int or kind is bool:
            ints.append(value)
            signature.append(kind)
        elif kind is float:
            floats.append(value)
            signature.append(float)
        else:
            signature.append(value)
    return tuple(signature), ints, floats


def _plain(name: object, value: Any, typed: bool) -> Any:
    """An attribute's value in Python's own types. Raises SettingError if it cannot be sent."""
    plain: Any
    try:
        if isinstance(value, (list, tuple)):
            plain = _plain_list(value, typed)
        elif isinstance(value, (bytearray, memoryview)):
            plain = bytes(memoryview(value))
        else:
            plain = _scalar(value, typed)
        if plain is not None:
            return plain
        expected = _expected(value, typed)
    except Exception as error:
        what = f"{shown(value)}, expected a value that can be read: {shown(error)}"
        raise SettingError(f"attribute {shown(name)}: {what}") from error
    raise SettingError(f"attribute {shown(name)}: {shown(value)}, expected {expected}")


def _expected(value: Any, typed: bool) -> str:
    """What the error for a value that cannot be sent says was expected."""
    is_list = isinstance(value, (list, tuple))
    items = value if is_list else (value,)
    if any(hasattr(type(item), "__dlpack__") for item in items):
        return (
            "no tensor: those are a call's positional arguments, or what a handler returns; item() is a number of one"
        )
    if not typed:
        known = "an int, float, str, bytes, or a list of ints or of strings"
        only_later = is_list and {type(_scalar(item, typed)) for item in items} <= {int, float}
        return f"{known}: the peer is of a version that knows no lists of floats" if only_later else known
    return (
        "an int, bool, float, str, bytes, or a list of ints, of bools, of floats or of strings "
        "(of ints and floats if the ints are floats exactly)"
    )


def _plain_list(value: Sequence[Any], typed: bool) -> tuple[Any, ...] | None:
    items = tuple(value)
    kinds = set(map(type, items))
    if not kinds <= {int, float, str}:
        items = tuple(_scalar(item, typed) for item in items)
        kinds = set(map(type, items))
    if kinds <= {int} or kinds == {str}:
        return items
    if typed and kinds == {bool}:
        return Packed(gen.AttrType.Bools, bytes(items))
    if typed and kinds <= {int, float}:
        with contextlib.suppress(OverflowError):  # an int beyond a float's range
            floats = tuple(map(float, items))
            if floats == items:
                return Packed(gen.AttrType.Floats, struct.pack(f"<{len(floats)}d", *floats))
    return None


def _scalar(value: Any, typed: bool) -> int | float | str | bytes | None:
    """A number, text or bytes (also a numpy scalar or an enum member) in Python's own types.

    None for anything else, and for a number that would change: one with a unit, or beyond a float's range. Methods that
    subclasses override are not called.
    """
    if isinstance(value, str):
        return str.__str__(value)  # an enum overrides __str__
    if isinstance(value, bytes):
        return bytes(memoryview(value))
    if isinstance(value, np.timedelta64):  # numpy counts it as an integer, which drops the unit
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value) if typed else int(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) or value in (number, -number) or number != number else None
    return None


def min_nbytes(name: str, value: Any) -> int:
    """The least bytes of metadata that an attribute takes. `value`: as in the signature of `split`."""
    nbytes = len(name)
    if isinstance(value, Packed):
        return nbytes + len(value.data)
    if isinstance(value, tuple):
        return nbytes + sum(4 + len(item) if isinstance(item, str) else 8 for item in value)
    return nbytes + len(value) if isinstance(value, (str, bytes)) else nbytes


def check_texts(name: str, value: Any) -> None:
    """Raises SettingError for a text that is not Unicode. `value`: as in the signature of `split`."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not is_unicode(text):
            raise SettingError(f"attribute {shown(name)}: {shown(text)}, expected valid Unicode")


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, that is, has no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def number_error(
    attrs: Mapping[str, Any], signature: Sequence[Any], ints: Sequence[int]
) -> SettingError | LocalProtocolError:
    """The error for numbers of a message that do not fit their fields."""
    names = [name for name, kind in zip(attrs, signature) if kind is int or kind is bool]
    for name, number in zip(names, ints):
        if not _INT64_MIN <= number <= _INT64_MAX:
            return SettingError(f"attribute {shown(name)}: {shown(attrs[name])}, expected an int of 64 bits")
    return LocalProtocolError("a number of the metadata does not fit its field")
