"""The rules before the model: frames, sizes, resize, patches, template, tokens (acceptance 5)."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from services.contract import ScoreFailure
from services.media.base import Media
from services.media.frames import TooFewFrames, frame_count, take
from services.scorers.videoalign import tiny
from services.scorers.videoalign.config import PUBLIC_TEMPLATE_SHA256
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.frames import MIN_PIXELS, UnusableSize, frame_spec, grid, resized, video_tokens
from services.scorers.videoalign.pixels import CLIP_MEAN, CLIP_STD, patchify, resize
from services.scorers.videoalign.template import fill, read_template
from services.scorers.videoalign.tokens import RewardTokenizer

MAX_PIXELS = 200704
SPEC = frame_spec(2.0, None, MAX_PIXELS)
SHARED = Path(os.environ.get("DDRL_SHARED_DATA", Path(__file__).resolve().parents[6] / "shared" / "data")) / "videoalign"


@pytest.mark.parametrize(
    ("total", "fps", "sampled"),
    [(93, 16, 12), (93, 24, 8), (81, 16, 10), (53, 16, 6), (126, 24, 10), (152, 30, 10), (60, 16, 8), (9, 16, 4), (3, 16, 2)],
)
def test_acceptance_5_number_of_frames(total: int, fps: float, sampled: int) -> None:
    assert frame_count(SPEC, total, fps) == sampled


def test_acceptance_5_one_frame_is_too_few() -> None:
    with pytest.raises(TooFewFrames):
        frame_count(SPEC, 1, 16)


@given(st.integers(2, 5000), st.floats(1, 120))
def test_frames_run_evenly_from_first_to_last_as_torch_rounds_them(total: int, fps: float) -> None:
    count = frame_count(SPEC, total, fps)
    assert 2 <= count <= total
    assert count % 2 == 0
    frames = np.arange(total, dtype=np.uint32).view(np.uint8).reshape(total, 4, 1)[:, :2].repeat(3, -1)[:, None]
    picked = take(SPEC, Media(np.ascontiguousarray(frames), fps)).frames[:, 0, :, 0].copy().view(np.uint16)[:, 0]
    assert picked.tolist() == torch.linspace(0, total - 1, count).round().long().tolist()


def test_a_fixed_number_of_frames_replaces_the_rate() -> None:
    spec = frame_spec(2.0, 7, MAX_PIXELS)
    assert [frame_count(spec, total, 16) for total in (100, 9, 5, 2)] == [8, 8, 4, 2]


@pytest.mark.parametrize(
    ("size", "wanted", "tokens"),
    [
        ((720, 1280), (336, 588), 252),
        ((704, 1280), (308, 588), 231),
        ((432, 768), (336, 588), 252),
        ((480, 832), (336, 588), 252),
        ((256, 256), (336, 336), 144),
        ((64, 64), (336, 336), 144),
        ((448, 448), (448, 448), 256),
        ((1080, 1920), (336, 588), 252),
        ((1280, 720), (588, 336), 252),
    ],
)
def test_acceptance_5_sizes_and_tokens(size: tuple[int, int], wanted: tuple[int, int], tokens: int) -> None:
    assert resized(*size, MAX_PIXELS) == wanted
    assert video_tokens(grid(2, *wanted)) == tokens


def test_acceptance_5_a_cosmos_clip() -> None:
    patches = grid(frame_count(SPEC, 93, 16), *resized(720, 1280, MAX_PIXELS))
    assert (patches, math.prod(patches), video_tokens(patches)) == ((6, 24, 42), 6048, 1512)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_size_is_accepted_as_it_is_afterwards(height: int, width: int) -> None:
    try:
        size = resized(height, width, MAX_PIXELS)
    except UnusableSize:
        assert max(height, width) > 28 * min(height, width)  # only slivers are refused
        return
    assert all(side % 28 == 0 and side > 0 for side in size)
    # Rounding the shorter side up to 28 can carry slivers over the area; nothing else does.
    assert math.prod(size) <= MAX_PIXELS or max(height, width) > 50 * min(height, width)
    if MIN_PIXELS <= math.prod(size) <= MAX_PIXELS:
        assert resized(*size, MAX_PIXELS) == size


def test_a_sliver_is_refused() -> None:
    with pytest.raises(UnusableSize, match="aspect ratio"):
        resized(10, 2001, MAX_PIXELS)


def _weights(before: int, after: int) -> np.ndarray:
    """Antialiased bicubic (a = -0.5) as a matrix [after, before], in float64."""
    scale = before / after
    spread = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    x = np.abs((np.arange(before)[None] + 0.5 - centre[:, None]) / spread)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(("before", "after"), [((48, 64), (84, 112)), ((120, 96), (56, 84)), ((56, 84), (56, 84))])
def test_the_resize_is_bicubic_with_antialiasing_clamped_and_rounded(before: tuple[int, int], after: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *before, 3), np.uint8)
    ours = resize(frames, after)
    assert (ours.dtype, tuple(ours.shape)) == (torch.uint8, (2, 3, *after))
    exact = np.einsum("ah,bw,thwc->tcab", _weights(before[0], after[0]), _weights(before[1], after[1]), frames.astype(np.float64)).clip(0, 255)
    apart = np.abs(ours.numpy() - exact)
    assert apart.max() < 0.5 + 1e-3  # the nearest whole number, ties aside
    assert before != after or apart.max() == 0


def test_acceptance_5_patches_equal_the_stock_processors() -> None:
    picture = tiny.clip(1, 112, 168)[0]
    stock = Qwen2VLImageProcessorPil(do_resize=False)(images=[Image.fromarray(picture)], return_tensors="pt")
    ours, patches = patchify(resize(np.stack([picture, picture]), (112, 168)))
    assert stock["image_grid_thw"].tolist() == [list(patches)]
    torch.testing.assert_close(ours, stock["pixel_values"], rtol=0, atol=1e-6)


def test_patches_are_in_the_order_of_the_definition() -> None:
    planes = resize(tiny.clip(4, 56, 84), (56, 84))
    ours, (t, h, w) = patchify(planes)
    mean, std = np.array(CLIP_MEAN)[:, None, None, None], np.array(CLIP_STD)[:, None, None, None]
    rows = []
    for pair in range(t):
        for top in range(0, h, 2):
            for left in range(0, w, 2):
                for y in range(top, top + 2):
                    for x in range(left, left + 2):
                        patch = planes[2 * pair : 2 * pair + 2, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].numpy().transpose(1, 0, 2, 3)
                        rows.append(((patch / 255 - mean) / std).ravel())
    np.testing.assert_allclose(ours, np.array(rows), rtol=0, atol=1e-5)


@pytest.fixture
def public_template() -> str:
    file = SHARED / "detailed_special.txt"
    if not file.is_file():
        pytest.skip(f"VideoAlign's prompt template is not at {file}; set DDRL_SHARED_DATA to check its hash and tokens")
    return read_template(file, PUBLIC_TEMPLATE_SHA256)


def test_acceptance_5_hashes_of_the_public_template(public_template: str) -> None:
    filled = fill(public_template, "a cat").encode()
    assert (len(public_template.encode()), public_template.count("\n")) == (3997, 37)
    assert (len(filled), hashlib.sha256(filled).hexdigest()) == (3989, "3c8e9026e357f4015e5f12406667aa8dffa7cb4222a800e74f87bd9655c3f1f0")


def test_the_public_template_makes_a_sequence(public_template: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = RewardTokenizer(tmp_path / "tokenizer.json", public_template)
    ids = tokenizer.encode("a cat", 5)
    assert isinstance(ids, list)
    assert [i for i in ids if i in tokenizer.reward_ids] == list(tokenizer.reward_ids)
    assert ids.count(tokenizer.video_id) == 5


def _python(template: str) -> str:
    return f"import os\nos.mkdir('ran')\nOTHER = 'x'\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {template!r}\nraise SystemExit\n"


def test_a_template_is_taken_out_of_python_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt_template.py").write_text(_python(tiny.TEMPLATE))
    assert read_template(tmp_path / "prompt_template.py", tiny.TEMPLATE_SHA256) == tiny.TEMPLATE
    assert not (tmp_path / "ran").exists()


def test_the_public_template_is_taken_out_of_python(public_template: str, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(_python(public_template))
    assert read_template(tmp_path / "t.py", PUBLIC_TEMPLATE_SHA256) == public_template


@pytest.mark.parametrize("change", [("  \n", "\n"), ("\n", "\r\n"), ("good?", "good? ")])
def test_a_template_changed_by_one_blank_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(tiny.TEMPLATE.replace(*change).encode())
    with pytest.raises(CheckpointError, match="hashes to"):
        read_template(file, tiny.TEMPLATE_SHA256)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.py", b"x = (", "cannot be read"),
        ("t.py", b"OTHER = 'x'", "assigns no string"),
        ("t.py", b"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = open('/etc/passwd').read()", "assigns no string"),
        ("t.txt", b"\xff\xfe", "cannot be read"),
        ("t.txt", b"x" * 1_000_001, "has 1000001 bytes"),
    ],
)
def test_a_file_without_a_template_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_template(tmp_path / name, tiny.TEMPLATE_SHA256)


@pytest.mark.parametrize(
    "template",
    [
        tiny.TEMPLATE.replace("{text_prompt}", ""),
        tiny.TEMPLATE.replace("<|MQ_reward|>", ""),
        tiny.TEMPLATE + "<|TA_reward|>",
        tiny.TEMPLATE.replace("VQ_", "XX_").replace("MQ_", "VQ_").replace("XX_", "MQ_"),
        "{text_prompt}" + tiny.TEMPLATE.replace("{text_prompt}", ""),
    ],
)
def test_a_template_of_another_shape_is_refused_whatever_its_hash(tmp_path: Path, template: str) -> None:
    (tmp_path / "t.txt").write_bytes(template.encode())
    with pytest.raises(CheckpointError, match="once each and in this order"):
        read_template(tmp_path / "t.txt", hashlib.sha256(template.encode()).hexdigest())


@pytest.fixture
def tokenizer(tmp_path: Path) -> RewardTokenizer:
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    return RewardTokenizer(tmp_path / "tokenizer.json", tiny.TEMPLATE)


def test_the_sequence_is_the_chat_layout_around_the_filled_template(tokenizer: RewardTokenizer) -> None:
    ids = tokenizer.encode("a {cat} é", 3)
    assert isinstance(ids, list)
    text = tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|video_pad|><|video_pad|><|vision_end|>"
        + fill(tiny.TEMPLATE, "a {cat} é")
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_reward_tokens_that_the_tokenizer_lacks_are_appended_in_order(tmp_path: Path, tokenizer: RewardTokenizer) -> None:
    tiny.write_tokenizer(tmp_path / "base.json", reward_tokens=False)
    appended = RewardTokenizer(tmp_path / "base.json", tiny.TEMPLATE)
    assert appended.reward_ids == tokenizer.reward_ids == (tokenizer.size - 3, tokenizer.size - 2, tokenizer.size - 1)
    assert appended.encode("a cat", 2) == tokenizer.encode("a cat", 2)


@pytest.mark.parametrize(
    "prompt",
    ["<|TA_reward|>", "a <|VQ_reward|> cat", "<|video_pad|>", "<|im_end|>", "<|endoftext|>", "<|not one of ours|>", "<|\n|>", "x <| y |> z"],
)
def test_control_sequences_in_a_prompt_are_refused(tokenizer: RewardTokenizer, prompt: str) -> None:
    result = tokenizer.encode(prompt, 4)
    assert isinstance(result, ScoreFailure)
    assert (result.code, result.retryable) == ("prompt_refused", False)


@pytest.mark.parametrize("prompt", ["", "a | b", "1 < 2 |> 3", "< |TA_reward| >", "{text_prompt}", "{0} %s \\n", "猫が走る", "🐈\u0301", "\u0000"])
def test_other_prompts_pass_as_text(tokenizer: RewardTokenizer, prompt: str) -> None:
    assert isinstance(tokenizer.encode(prompt, 4), list)


def test_text_that_is_not_unicode_is_a_failure_of_its_item(tokenizer: RewardTokenizer) -> None:
    result = tokenizer.encode("a \ud800 cat", 4)
    assert isinstance(result, ScoreFailure)
    assert result.code == "prompt_invalid"


@given(
    prompt=st.text(st.characters(codec="utf-8"))
    | st.lists(st.sampled_from([*tiny.SPECIAL_TOKENS, *tiny.REWARD_TOKENS, "<|", "|>", "<", "|", "x", " "])).map("".join)
)
def test_no_prompt_gets_a_control_token_into_the_sequence(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    file = Path(tmp_path_factory.getbasetemp()) / "fuzz.json"
    if not file.exists():
        tiny.write_tokenizer(file)
    tokenizer = RewardTokenizer(file, tiny.TEMPLATE)
    plain, ids = tokenizer.encode("", 2), tokenizer.encode(prompt, 2)
    if isinstance(ids, list):
        assert isinstance(plain, list)
        assert [i for i in ids if i >= 256] == [i for i in plain if i >= 256]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        RewardTokenizer(tmp_path / "t.json", tiny.TEMPLATE)
