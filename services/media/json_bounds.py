"""How deep and how large a JSON text is, found before it is parsed. One pass, no memory, no recursion.

A parser turns two bytes into an object of tens of bytes, so a body within its byte limit could still fill the memory:
what counts is the number of values. Strings (base64 media) are skipped at the speed of a search.
"""

from __future__ import annotations

import re

MAX_MARKS = 100_000  # brackets and commas outside strings: a hundred thousand values are far beyond any request

# Possessive and with an optional end: a broken string is read once to its end, whatever is in it.
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)


class JsonTooLarge(ValueError):
    """Nested too deep, or too many values; the text may go to the client."""


def check_json(text: bytes, max_depth: int, max_marks: int = MAX_MARKS) -> None:
    """Raises ``JsonTooLarge``. Says nothing about whether ``text`` is JSON."""
    depth = marks = 0
    for match in _MARKS.finditer(text):
        mark = match[0]
        if mark[0] == 0x22:
            continue
        marks += 1
        if mark in b"[{":
            depth += 1
            if depth > max_depth:
                raise JsonTooLarge(f"the JSON is nested more than {max_depth} deep")
        elif mark in b"]}":
            depth -= 1
        if marks > max_marks:
            raise JsonTooLarge(f"the JSON has more than {max_marks} values")
