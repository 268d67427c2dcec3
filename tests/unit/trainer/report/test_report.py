"""The run report, on synthetic run folders. All numbers and images here are test data, not results."""

import functools
import html.parser
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import pytest

from trainer.report.figures import Line, Scale, limits, line_chart
from trainer.report.outcome import compare, intervals_apart, measures, provisional_summary
from trainer.report.page import render, write_report
from trainer.report.record import load_run, redact
from trainer.report.wording import ascii_text, duration, fixed, interval, percent, signed

UPDATES = 40


@functools.cache
def grid_png(width: int = 96, height: int = 48, seed: int = 0) -> bytes:
    """A complete small PNG with a pattern of tiles."""
    noise = random.Random(seed)
    tiles = {(x, y): noise.randbytes(3) for x in range(width // 24 + 1) for y in range(height // 24 + 1)}
    rows = b"".join(b"\0" + b"".join(tiles[x // 24, y // 24] if x % 24 and y % 24 else b"\xff\xff\xff" for x in range(width)) for y in range(height))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def update_line(step: int, updates: int, noise: random.Random, policy: bool = True, gain: float = 0.3) -> dict[str, object]:
    """One made-up update line of metrics.jsonl."""
    done = step / updates
    line: dict[str, object] = {
        "kind": "update",
        "step": step,
        "time": 1.79e9 + 3.1 * step,
        "data_loss": 0.231 + noise.gauss(0, 0.004),
        "grad_norm": 0.4 + abs(noise.gauss(0, 0.1)),
        "lr": 1e-4,
        "skipped": 0,
        "seconds": {
            "wait": 0.3 + 0.2 * noise.random(),
            "train": 1.9 + 0.2 * noise.random(),
            "publish": 0.11,
            "sample": 2.2 + 0.3 * noise.random(),
            "score": 0.4,
        },
        "groups": {
            "leased": 2,
            "ready": 4 + step % 3,
            "claimed": 8,
            "settled": 8 * max(0, step - 2),
            "evicted": 0,
            "dead": 0,
        },
    }
    if policy:
        line |= {
            "reward_mean": 0.3 + gain * (1 - math.exp(-3 * done)) + noise.gauss(0, 0.02),
            "reward_std": 0.2,
            "zero_variance_groups": int(noise.random() < 0.05),
            "policy_loss": noise.gauss(-0.002, 0.001),
            "ratio_deviation": abs(noise.gauss(2e-4, 5e-5)),
            "clip_fraction": 0.02,
            "staleness_mean": noise.choice([0.0, 0.25, 0.5, 1.0]),
            "staleness_max": 1,
        }
    return line


def eval_line(step: int, done: float, split: str, weights: str, gain: float, rise: float) -> dict[str, object]:
    """One made-up held-out evaluation."""
    shape = 1 - math.exp(-3 * done)
    lag = 0.9 if weights == "ema" and done else 1.0
    return {
        "kind": "eval",
        "split": split,
        "step": step,
        "weights": weights,
        "reward": 0.297 + gain * shape * lag,
        "reward_stderr": 0.011,
        "exact_match": 0.06 + 0.8 * gain * shape * lag,
        "diffusion_loss": 0.1190 * (1 + rise * done * lag),
        "diversity": 0.2710 * (1 - 0.3 * rise * done),
        "scene": {
            "brightness": 0.51 - 0.02 * done,
            "contrast": 0.22 + 0.3 * rise * done * 0.22,
            "colourfulness": 0.33 * (1 - rise * done),
            "edge_density": 0.14 * (1 - 1.5 * rise * done),
        },
        "prompts": 256,
    }


def make_run(
    folder: Path,
    *,
    name: str = "glyph-ddrl",
    objective: str = "ddrl",
    gain: float = 0.3,
    rise: float = 0.012,
    updates: int = UPDATES,
    seed: int = 0,
    finished: bool = True,
    policy: bool = True,
) -> Path:
    """A made-up run folder with every file the report reads."""
    noise = random.Random(seed)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: {name}\nseed: {seed}\nobjective:\n  preset: {objective}\nredis:\n  url: redis://:hunter2@head:6379/0\n"
        "rewards:\n  api_key: sesame\n  model: ocr\n"
    )
    lines = []
    every = max(1, updates // 8)
    for step in range(updates + 1):
        if step:
            lines.append(update_line(step, updates, noise, policy, gain))
        if step % every == 0:
            lines += [eval_line(step, step / updates, "dev", weights, gain, rise) for weights in ("raw", "ema")]
            (folder / "samples" / f"step-{step:06d}.png").write_bytes(grid_png(seed=step))
        if step in (0, updates):
            lines.append(eval_line(step, step / updates, "test", "raw", gain, rise))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples" / "before.png").write_bytes(grid_png(seed=0))
    if finished:
        (folder / "samples" / "after.png").write_bytes(grid_png(seed=99))
        (folder / "summary.json").write_text(json.dumps(make_summary(gain, rise, updates, seed)))
    return folder


def make_summary(gain: float = 0.3, rise: float = 0.012, updates: int = UPDATES, seed: int = 0) -> dict[str, object]:
    """A made-up summary.json."""
    return {
        "seed": seed,
        "objective": "ddrl",
        "prompts": 256,
        "updates": updates,
        "groups": 8 * updates,
        "ocr_before": 0.297,
        "ocr_after": 0.297 + gain,
        "ocr_after_ema": 0.297 + 0.9 * gain,
        "ocr_gain_stderr": 0.012,
        "ocr_gain_ci95": [gain - 0.024, gain + 0.024],
        "exact_match_before": 0.06,
        "exact_match_after": 0.06 + 0.8 * gain,
        "exact_match_after_ema": 0.06 + 0.7 * gain,
        "diffusion_loss_before": 0.119,
        "diffusion_loss_after": 0.119 * (1 + rise),
        "diffusion_loss_after_ema": 0.119 * (1 + 0.8 * rise),
        "diffusion_loss_rise": rise,
        "diffusion_loss_rise_ci95": [rise - 0.004, rise + 0.004],
        "diversity_before": 0.271,
        "diversity_after": 0.271 * (1 - 0.3 * rise),
        "diversity_change": -0.3 * rise,
        "wall_seconds": {"start": 21.0, "train": 512.0, "eval": 44.0},
    }


class Page(html.parser.HTMLParser):
    """The parts of a page the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.drawings: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "form")
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.references += [str(found[key]) for key in ("src", "href", "xlink:href") if key in found]
        if tag == "img":
            self.images.append(found)
        if tag == "svg" and found.get("role") == "img":
            self.drawings.append(found)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    out = write_report([make_run(folder / "run")], folder / "deep" / "report.html")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text()


def test_page_shows_one_run_and_stands_alone(whole_page: str) -> None:
    text = whole_page
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= set(page.ids)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 2 + 8
    assert all(drawing["aria-label"] for drawing in page.drawings)
    for words in (
        "glyph-ddrl",
        "ddrl",
        "0.297",
        "0.597",
        "+0.300",
        "+0.276 … +0.324",
        "+1.2 %",
        "EMA",
        "Diversity",
        "Exact match",
        "Staleness",
        "Policy loss",
        "Data loss",
        "Gradient norm",
        "Ratio deviation",
        "Edge density",
        "settled",
        "clear gain",
        "within the stop line",
        "stop line +10 %",
    ):
        assert words in page.text, words
    assert "What is missing" not in page.text
    assert not re.search(r"#0a0[ab]", text), "a stand-in colour was left in a drawing"


def test_page_keeps_secrets_of_the_config_to_itself(whole_page: str) -> None:
    assert "hunter2" not in whole_page
    assert "sesame" not in whole_page
    assert "redis://***@head:6379/0" in whole_page


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ("url: redis://user:pw@h:1/0", "url: redis://***@h:1/0"),
        ("  password: abc", "  password: ***"),
        ("hf_token: abc", "hf_token: ***"),
        ("api_key: null", "api_key: null"),
        ("max_tokens: 12", "max_tokens: 12"),
    ],
)
def test_redact(config: str, shown: str) -> None:
    assert redact(config) == shown


def test_crashed_run_is_readable_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[: len(whole) - 100])
    (folder / "samples" / "before.png").write_bytes(grid_png()[:200])
    run = load_run(folder)
    assert run.updates[-1].step == UPDATES
    page = Page(render([run]))
    for words in (
        "cut off, as after a crash",
        "summary.json is missing",
        "before.png is cut off",
        "after.png is missing",
        "No sample grid",
        f"Latest, update {UPDATES}",
        "Provisional",
    ):
        assert words in page.text, words


@pytest.mark.parametrize("lacking", ["config.yaml", "metrics.jsonl", "summary.json", "samples/before.png", "samples/after.png"])
def test_any_file_may_be_missing(tmp_path: Path, lacking: str) -> None:
    folder = make_run(tmp_path / "run", updates=4)
    (folder / lacking).unlink()
    run = load_run(folder)
    assert any(problem.startswith(f"{lacking} is missing") for problem in run.problems)
    if lacking in ("config.yaml", "metrics.jsonl"):
        assert "What is missing" in render([run])


def test_empty_folder_and_unreadable_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert "Neither updates nor evaluations" in Page(render([load_run(folder)])).text
    (folder / "config.yaml").write_text("a: [1,")
    (folder / "summary.json").write_text("{")
    (folder / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"kind":"update"}\n{"kind":"update","step":1,"reward_mean":NaN}\n')
    page = Page(render([load_run(folder)]))
    for words in (
        "config.yaml cannot be read",
        "summary.json cannot be read",
        "line 1 is not JSON",
        "line 2 is not an object",
    ):
        assert words in page.text


def test_missing_folder_and_no_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "report.html")


def test_summary_without_some_keys_says_which_and_shows_dashes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = make_summary()
    del summary["ocr_after"]
    summary["diversity_after"] = summary["diversity_change"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    run = load_run(folder)
    assert run.problems == ["summary.json lacks ocr_after."]
    rows = measures(run.summary or {})
    assert rows[0].change is None
    assert rows[3].change is None
    assert "—" in Page(render([run])).text


def test_restart_drops_the_dead_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    noise = random.Random(0)
    first = [update_line(step, 9, noise) for step in range(1, 8)] + [eval_line(6, 0.5, "dev", "raw", 0.9, 0.9)]
    again = [update_line(step, 9, noise) for step in range(5, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first + again))
    run = load_run(folder)
    assert [update.step for update in run.updates] == [1, 2, 3, 4, 5, 6]
    assert run.updates[4].values["data_loss"] == again[0]["data_loss"]
    assert run.evals == []
    assert run.restarts == 1


def test_sft_run_has_no_policy_panels(tmp_path: Path) -> None:
    page = Page(render([load_run(make_run(tmp_path / "run", objective="sft", policy=False))]))
    assert "Data loss" in page.text
    assert "Policy loss" not in page.text
    assert "Staleness" not in page.text


def test_comparison_of_runs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", name="ddrl-0", rise=0.012),
        make_run(tmp_path / "b", name="flow-grpo-0", objective="flow_grpo", rise=0.24, gain=0.38),
        make_run(tmp_path / "c", name="flow-grpo-0", rise=0.01, finished=False),
    ]
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    for words in ("ddrl comparison of 3 runs", "What the reward cost", "20 ×", "apart", "not known",
                  "past the stop line", "What is missing in"):  # fmt: skip
        assert words in page.text, words
    assert len(page.ids) == len(set(page.ids))


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    text = render([load_run(make_run(tmp_path / "run", name='"<b>x</b> $\\alpha"', updates=3))])
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text


def test_compare_needs_a_reference_that_rose() -> None:
    rows = compare([("a", make_summary(rise=-0.01)), ("b", make_summary(rise=0.05))])
    assert rows[1].ratio is None
    assert "did not rise" in rows[1].note
    assert rows[1].apart is True
    rows = compare([("a", make_summary(rise=0.02)), ("b", make_summary(rise=0.025))])
    assert rows[1].ratio == pytest.approx(1.25)
    assert rows[1].apart is False


def test_intervals_apart() -> None:
    assert intervals_apart((0, 1), (1.1, 2)) is True
    assert intervals_apart((0, 1), (1, 2)) is False
    assert intervals_apart((1.1, 2), (0, 1)) is True
    assert intervals_apart(None, (0, 1)) is None


def test_interval_of_the_gain_comes_from_the_paired_error_if_absent() -> None:
    summary = make_summary()
    del summary["ocr_gain_ci95"]
    low, high = measures(summary)[0].ci95 or (0, 0)
    assert (low, high) == (pytest.approx(0.3 - 0.02352, abs=1e-5), pytest.approx(0.3 + 0.02352, abs=1e-5))


@pytest.mark.parametrize(
    ("rise", "ci95", "tone"),
    [(0.01, None, "good"), (0.09, [0.07, 0.11], "warn"), (0.11, [0.10, 0.12], "bad"), (None, None, "none")],
)
def test_stop_line_verdict(rise: float | None, ci95: list[float] | None, tone: str) -> None:
    row = measures({"diffusion_loss_rise": rise, "diffusion_loss_rise_ci95": ci95})[2]
    assert row.tone == tone


def test_provisional_summary_prefers_the_test_split(tmp_path: Path) -> None:
    found, split = provisional_summary(load_run(make_run(tmp_path / "run", finished=False)))
    assert split == "test"
    assert found["ocr_before"] == 0.297
    assert "ocr_gain_stderr" not in found


def test_limits_follow_the_meaning_of_the_scale() -> None:
    assert limits(Scale.SHARE, [0.2, 0.4]) == (0.0, 1.02)
    assert limits(Scale.CHANGE, [0.3, 1.0], stop=10) == (-12, 12)
    assert limits(Scale.CHANGE, [0.3, 50.0])[1] > 50
    assert limits(Scale.AMOUNT, [2.0, 4.0])[0] == 0
    low, high = limits(Scale.FITTED, [-1.0, -1.0])
    assert low < -1 < high


def test_alternative_text_is_escaped() -> None:
    svg = line_chart("f", 'a "quoted" <name>', [Line([0, 1], [0, 1])], Scale.SHARE)
    assert 'aria-label="a &quot;quoted&quot; &lt;name&gt;"' in svg


def test_wording() -> None:
    assert (fixed(None), fixed(-0.5, 1), signed(0.0001), signed(-0.02)) == ("—", "−0.5", "±0.000", "−0.020")
    assert percent(0.0123) == "+1.2\u202f%"
    assert interval((0.1, 0.2), 1, relative=True) == "+10.0 … +20.0\u202f%"
    assert [ascii_text(duration(s)) for s in (2.44, 59.99, 200, 4320, 190000)] == [
        "2.4 s", "1 min 0 s", "3 min 20 s", "1 h 12 min", "2 d 4 h",
    ]  # fmt: skip
    assert ascii_text("−1.2\u202f% ± —") == "-1.2 % +- -"
