"""Addresses as they may be shown: without the password, wherever in the URL it stands."""

import re


def without_password(text: str) -> str:
    """`redis://:pw@host:6379/0 → redis://:***@host:6379/0`; also in `?password=pw`. Text that is no URL stays as it is."""
    return re.sub(r"([?&]password=)[^&\s]+", r"\1***", re.sub(r"(://[^:/@\s]*:)\S+@", r"\1***@", text))
