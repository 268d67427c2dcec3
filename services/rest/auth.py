"""Bearer keys with scopes, from a file or an environment variable.

One key per line: ``name scopes secret``, scopes joined by commas (``score``, ``admin``; admin includes score), the
secret either plain (at least 20 characters) or ``sha256:<64 hex digits>`` of it. Blank lines and ``#`` comments are
skipped. In memory there are only SHA-256 digests: keys are long and random, so a slow hash would protect nothing.

``python -m services.rest.auth NAME [SCOPES]`` makes a key: the secret goes to standard output once, the line for the file,
which holds only the digest, to standard error.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "DDRL_REWARD_KEYS"
SCOPES = ("score", "admin")
_MIN_SECRET = 20


class KeysError(ValueError):
    """The keys cannot be used, or there are none where they are required. The text never holds a secret."""


@dataclass(frozen=True)
class Key:
    """Who may do what; ``digest`` is the SHA-256 of the secret."""

    name: str
    scopes: frozenset[str]
    digest: bytes


class Keyring:
    """All keys of a service."""

    def __init__(self, keys: list[Key]) -> None:
        if not keys:
            raise KeysError("there is no key; add a line 'name score secret'")
        self._keys = tuple(keys)

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` opens. Takes the same time for every secret: all digests are compared."""
        presented, found = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest(), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, presented):
                found = key
        return found


def parse_keys(text: str, source: str) -> Keyring:
    """Keys from lines. Raises ``KeysError`` naming the line, never its secret."""
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{source}, line {number}"
        if len(fields) != 3:
            raise KeysError(f"{where}: expected 'name scopes secret', found {len(fields)} fields")
        name, scopes, secret = fields
        given = frozenset(scopes.split(","))
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise KeysError(f"{where}: a name has letters, digits, '_', '.' and '-'")
        if not given <= set(SCOPES):
            raise KeysError(f"{where}: unknown scope {min(given - set(SCOPES))!r}; there are {', '.join(SCOPES)}")
        if name in {key.name for key in keys}:
            raise KeysError(f"{where}: the name {name!r} is there twice")
        keys.append(Key(name, given | ({"score"} if "admin" in given else set()), _digest(secret, where)))
    try:
        return Keyring(keys)
    except KeysError as error:
        raise KeysError(f"{source}: {error}") from None


def load_keys(file: Path | None) -> Keyring | None:
    """Keys from ``file``, else from ``$DDRL_REWARD_KEYS``, else None. Raises ``KeysError``."""
    if file is None:
        text = os.environ.get(KEYS_VARIABLE)
        return None if text is None else parse_keys(text, f"${KEYS_VARIABLE}")
    try:
        mode, text = file.stat().st_mode, file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"the keys file {file} cannot be read: {type(error).__name__}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("the keys file %s is open to others than its owner (mode %o); run: chmod 600 %s", file, stat.S_IMODE(mode), file)
    return parse_keys(text, str(file))


def require_keys(host: str, keyring: Keyring | None) -> None:
    """Refuse to listen beyond this machine without keys. Raises ``KeysError``."""
    if keyring is None and not is_loopback(host):
        raise KeysError(f"host {host} can be reached from other machines and there are no keys; set keys_file or ${KEYS_VARIABLE}, or bind 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def new_key(name: str, scopes: str = "score") -> tuple[str, str]:
    """A fresh secret, and its line for the keys file with only the digest."""
    secret = f"ddrl_{secrets.token_urlsafe(32)}"
    line = f"{name} {scopes} sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    parse_keys(line, "new key")
    return secret, line


def _digest(secret: str, where: str) -> bytes:
    if secret.startswith("sha256:"):
        digits = secret.removeprefix("sha256:")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
            raise KeysError(f"{where}: sha256: is followed by 64 hex digits")
        return bytes.fromhex(digits)
    if len(secret) < _MIN_SECRET:
        raise KeysError(f"{where}: the secret has {len(secret)} characters, at least {_MIN_SECRET} are needed")
    return hashlib.sha256(secret.encode()).digest()


if __name__ == "__main__":
    _secret, _line = new_key(*sys.argv[1:3])
    print(_secret)
    print(_line, file=sys.stderr)
