"""VideoAlign's prompt template: read from the user's own copy, checked byte for byte, filled with a prompt.

The template is not part of this project. It comes from ``prompt_template.py`` of a VideoAlign checkout, whose text is
parsed and never run, or from a file that holds only the template. Blanks at line ends matter: they are tokens.

Invariant: a loaded template has one ``{text_prompt}`` and each reward token once, in the order VQ, MQ, prompt, TA. The
decoder is causal, hence VQ and MQ cannot depend on the prompt.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from services.scorers.videoalign.errors import CheckpointError

REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
PLACEHOLDER = "{text_prompt}"
VARIABLE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
FILE_NAMES = ("prompt_template.txt", "prompt_template.py")
MAX_BYTES = 1_000_000


def read_template(file: Path, sha256: str) -> str:
    """The template in ``file`` (.py or plain text). Raises ``CheckpointError`` unless it is well formed and hashes to ``sha256``."""
    if not file.is_file():
        raise CheckpointError(f"no prompt template at {file}. Get prompt_template.py from VideoAlign's repository (docs/rewards/videoalign.md)")
    if file.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; a prompt template has a few thousand")
    try:
        text = file.read_bytes().decode("utf-8")
        template = _from_python(text, file) if file.suffix == ".py" else text
    except (UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a template: {error}") from error
    found = hashlib.sha256(template.encode()).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"the template in {file} hashes to {found}, expected {sha256}. Blanks at line ends count; take the file from VideoAlign's repository "
            "unchanged, or set template_sha256 if the model was trained with another template"
        )
    _check_order(template, file)
    return template


def fill(template: str, prompt: str) -> str:
    """The user turn's text for ``prompt``; braces in the prompt are plain characters."""
    return template.replace(PLACEHOLDER, prompt)


def _from_python(source: str, file: Path) -> str:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        named = any(isinstance(target, ast.Name) and target.id == VARIABLE for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
    raise CheckpointError(f"{file} assigns no string to {VARIABLE}")


def _check_order(template: str, file: Path) -> None:
    parts = (*REWARD_TOKENS[:2], PLACEHOLDER, REWARD_TOKENS[2])
    counts = {part: template.count(part) for part in parts}
    places = [template.find(part) for part in parts]
    if any(count != 1 for count in counts.values()) or places != sorted(places):
        raise CheckpointError(f"the template in {file} must hold {', '.join(parts)} once each and in this order; found {counts}")
