"""Keys: the file's form, scopes, where they are required, and that no secret shows anywhere."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from services.rest.auth import KEYS_VARIABLE, KeysError, is_loopback, load_keys, new_key, parse_keys, require_keys

SECRET = "a-secret-of-enough-length"


def test_plain_and_hashed_secrets_open_the_same_door() -> None:
    ring = parse_keys(f"# team keys\n\none score {SECRET}\ntwo score,admin sha256:{hashlib.sha256(b'other-secret-of-length').hexdigest()}\n", "keys")
    one, two = ring.find(SECRET), ring.find("other-secret-of-length")
    assert one is not None
    assert two is not None
    assert (one.name, one.scopes) == ("one", {"score"})
    assert (two.name, two.scopes) == ("two", {"score", "admin"})
    assert ring.find("") is ring.find(SECRET + "x") is ring.find("sha256:" + hashlib.sha256(SECRET.encode()).hexdigest()) is None
    assert ring.find("\udcff") is None


def test_admin_includes_score() -> None:
    key = parse_keys(f"ops admin {SECRET}", "keys").find(SECRET)
    assert key is not None
    assert key.scopes == {"score", "admin"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        (f"one {SECRET}", "line 1: expected"),
        (f"\none score {SECRET} x", "line 2: expected"),
        (f"one write {SECRET}", "unknown scope 'write'"),
        ("one score hunter2-secret", "at least 20"),
        ("one score sha256:hunter2-secret", "64 hex"),
        (f"o/ne score {SECRET}", "a name has"),
        (f"one score {SECRET}\none score {SECRET}2", "twice"),
    ],
)
def test_bad_lines_are_named_without_their_secret(text: str, says: str) -> None:
    with pytest.raises(KeysError, match=says) as refused:
        parse_keys(text, "the file")
    assert "hunter2" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_keys_come_from_the_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert load_keys(None) is None
    file = tmp_path / "keys"
    file.write_text(f"one score {SECRET}")
    file.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        assert load_keys(file) is not None
        assert caplog.text == ""
        file.chmod(0o644)
        assert load_keys(file) is not None
    assert "chmod 600" in caplog.text
    assert SECRET not in caplog.text
    monkeypatch.setenv(KEYS_VARIABLE, f"env score {SECRET}")
    ring = load_keys(None)
    assert ring is not None
    assert ring.find(SECRET) is not None
    monkeypatch.setenv(KEYS_VARIABLE, "")
    with pytest.raises(KeysError, match="no key"):
        load_keys(None)
    with pytest.raises(KeysError, match="cannot be read"):
        load_keys(tmp_path / "absent")


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True)])
def test_this_machine(host: str, local: bool) -> None:
    assert is_loopback(host) is local
    require_keys(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "", "127.0.0.1.example.org"])
def test_beyond_this_machine_keys_are_required(host: str) -> None:
    with pytest.raises(KeysError, match="there are no keys"):
        require_keys(host, None)
    require_keys(host, parse_keys(f"one score {SECRET}", "keys"))


def test_a_new_key_opens_what_its_line_says() -> None:
    secret, line = new_key("team", "score,admin")
    key = parse_keys(line, "keys").find(secret)
    assert key is not None
    assert (key.name, key.scopes) == ("team", {"score", "admin"})
    assert secret not in line
    done = subprocess.run([sys.executable, "-m", "services.rest.auth", "team"], capture_output=True, text=True, timeout=60, check=True)
    assert parse_keys(done.stderr, "keys").find(done.stdout.strip()) is not None
