"""The run report, on synthetic run folders. All numbers and images here are test data, not results."""

import base64
import fcntl
import functools
import hashlib
import html.parser
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from actors.clips import write_clip
from trainer.report.figures import Line, Scale, limits, line_chart
from trainer.report.outcome import compare, intervals_apart, measures, provisional_summary
from trainer.report.page import render, write_report
from trainer.report.reading import load_run, redact
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
            "reward_mean": 0.46 + gain * (1 - math.exp(-3 * done)) + noise.gauss(0, 0.02),
            "reward_std": 0.2,
            "rewards": {
                "ocr": 0.3 + gain * (1 - math.exp(-3 * done)) + noise.gauss(0, 0.02),
                "scene.sharpness": 1.6 + 0.4 * done + noise.gauss(0, 0.05),
            },
            "rewards_std": {"ocr": 0.2, "scene.sharpness": 0.3},
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
        "kind": "evaluation",
        "time": 1.79e9 + 3.1 * step + 1,
        "split": split,
        "step": step,
        "weights": weights,
        "set": f"{split}-256",
        "revisions": {"ocr": "rapidocr-1", "scene": "1", "jpeg": "1"},
        "rewards": {"ocr": 0.297 + gain * shape * lag, "scene.sharpness": 1.6 + 0.4 * done * lag, "jpeg": -2.1 - 0.5 * rise * done},
        "sub_scores": {"ocr.exact_match": 0.06 + 0.8 * gain * shape * lag, "ocr.strict": 0.1 + 0.7 * gain * shape * lag, "scene.brightness": 0.5},
        "failed": {},
        "first_failure": {},
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
        "fleet:\n  api_key: sesame\nrewards:\n  ocr: {weight: 1.0}\n  scene.sharpness: {weight: 0.1}\nheld_out_rewards: [jpeg]\n"
    )
    (folder / "eval").mkdir()
    if finished:
        write_state(folder, "finished")
    lines, evaluations = [], []
    every = max(1, updates // 8)
    for step in range(updates + 1):
        if step:
            lines.append(update_line(step, updates, noise, policy, gain))
        if step % every == 0:
            evaluations += [eval_line(step, step / updates, "dev", weights, gain, rise) for weights in ("raw", "ema")]
            (folder / "samples" / f"step-{step:06d}.png").write_bytes(grid_png(seed=step))
        if step in (0, updates):
            evaluations.append(eval_line(step, step / updates, "test", "raw", gain, rise))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    for line in evaluations:
        means = line["rewards"]
        assert isinstance(means, dict)
        scores = {name: [mean + noise.gauss(0, 0.18) for _ in range(256)] for name, mean in means.items()}
        (folder / "eval" / f"{line['split']}-{line['step']:06d}-{line['weights']}.json").write_text(json.dumps({**line, "per_prompt": {"rewards": scores}}))
    (folder / "samples" / "before.png").write_bytes(grid_png(seed=0))
    if finished:
        (folder / "samples" / "after.png").write_bytes(grid_png(seed=99))
        (folder / "summary.json").write_text(json.dumps(make_summary(gain, rise, updates, seed)))
    return folder


def write_state(folder: Path, state: str, reason: str = "", started: float = 1.79e9) -> None:
    (folder / "state.json").write_text(json.dumps({"state": state, "reason": reason, "exit": 0, "step": 4, "started": started, "pid": 1}))


def make_summary(gain: float = 0.3, rise: float = 0.012, updates: int = UPDATES, seed: int = 0) -> dict[str, object]:
    """A made-up summary.json."""
    return {
        "seed": seed,
        "objective": "ddrl",
        "prompts": 256,
        "updates": updates,
        "groups": 8 * updates,
        "evaluation_set": "test-256",
        "revisions": {"ocr": "rapidocr-1", "scene": "1", "jpeg": "1"},
        "rewards": {
            "ocr": {
                "before": 0.297, "after": 0.297 + gain, "after_ema": 0.297 + 0.9 * gain, "gain": gain, "stderr": 0.012,
                "ci95": [gain - 0.024, gain + 0.024], "pairs": 256, "trained": True,
            },
            "scene.sharpness": {"before": 1.6, "after": 2.0, "gain": 0.4, "stderr": 0.1, "ci95": [0.2, 0.6], "pairs": 256, "trained": True},
            "jpeg": {"before": -2.1, "after": -2.1 - 0.5 * rise, "gain": -0.5 * rise, "stderr": 0.1, "ci95": [-0.2, 0.2], "pairs": 256, "trained": False},
        },
        "sub_scores": {"ocr.exact_match": {"before": 0.06, "after": 0.06 + 0.8 * gain, "after_ema": 0.06 + 0.7 * gain}},
        "diffusion_loss_before": 0.119,
        "diffusion_loss_after": 0.119 * (1 + rise),
        "diffusion_loss_after_ema": 0.119 * (1 + 0.8 * rise),
        "diffusion_loss_rise": rise,
        "diffusion_loss_rise_ci95": [rise - 0.004, rise + 0.004],
        "diversity_before": 0.271,
        "diversity_after": 0.271 * (1 - 0.3 * rise),
        "diversity_change": -0.3 * rise,
        "wall_seconds": {"start": 21.0, "train": 512.0, "eval": 44.0},
    }  # fmt: skip


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
        "scene.sharpness",
        "jpeg",
        "held out",
        "ocr.exact_match",
        "jpeg, never trained on, from −2.100 to −2.106",
        "ddrl (policy 1, KL 0, data 0.01)",
        "finished",
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
    assert "What to look at" not in page.text
    assert "OCR" not in page.text
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
    assert run.updates[-1].step == UPDATES - 1
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
    del summary["sub_scores"], summary["rewards"]["ocr"]["gain"], summary["rewards"]["ocr"]["after"]  # type: ignore[index]
    summary["diversity_after"] = summary["diversity_change"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    run = load_run(folder)
    assert run.problems == ["summary.json lacks sub_scores."]
    rows = measures(run.summary or {})
    assert rows[0].change is None
    assert rows[4].change is None
    assert "—" in Page(render([run])).text


def test_restart_drops_the_dead_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    noise = random.Random(0)
    first = [update_line(step, 9, noise) for step in range(1, 8)] + [eval_line(6, 0.5, "dev", "raw", 0.9, 0.9)]
    again = [update_line(step, 9, noise) | {"time": 1.79e9 + 100 + step} for step in range(5, 7)]
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
    for words in ("ddrl comparison of 3 runs", "What the gain of ocr cost", "20 ×", "apart", "not known",
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
    del summary["rewards"]["ocr"]["ci95"]  # type: ignore[index]
    low, high = measures(summary)[0].ci95 or (0, 0)
    assert (low, high) == (pytest.approx(0.3 - 0.02352, abs=1e-5), pytest.approx(0.3 + 0.02352, abs=1e-5))


@pytest.mark.parametrize(
    ("rise", "ci95", "tone"),
    [(0.01, None, "good"), (0.09, [0.07, 0.11], "warn"), (0.11, [0.10, 0.12], "bad"), (None, None, "none")],
)
def test_stop_line_verdict(rise: float | None, ci95: list[float] | None, tone: str) -> None:
    row = measures({"diffusion_loss_rise": rise, "diffusion_loss_rise_ci95": ci95})[0]
    assert row.tone == tone


def test_provisional_summary_prefers_the_test_split(tmp_path: Path) -> None:
    found, split = provisional_summary(load_run(make_run(tmp_path / "run", finished=False)))
    assert split == "test"
    rewards = found["rewards"]
    assert isinstance(rewards, dict)
    assert rewards["ocr"]["before"] == 0.297
    assert "stderr" not in rewards["ocr"]
    assert [entry["trained"] for entry in rewards.values()] == [True, True, False]


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


# -- what a report must not claim -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "shown"),
    [("interrupted", "interrupted: stopped after update 4 of 60"), ("failed", "failed: stopped after update 4 of 60"), ("running", "ended without a word")],
)
def test_a_run_that_was_stopped_is_not_called_finished(tmp_path: Path, state: str, shown: str) -> None:
    folder = make_run(tmp_path / "run", updates=4)
    write_state(folder, state, "stopped after update 4 of 60")
    page = Page(render([load_run(folder)]))
    assert shown in page.text
    assert "finished" not in page.text.replace("no finished update", "")


def test_a_run_whose_driver_holds_the_folder_is_running(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=4)
    write_state(folder, "running")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_run(folder).state.words() == "running"
    assert load_run(folder).state.words() == "ended without a word"


def test_a_summary_of_an_earlier_end_is_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=4)
    write_state(folder, "interrupted", started=(folder / "summary.json").stat().st_mtime + 1)
    run = load_run(folder)
    assert run.summary is None
    assert "summary.json tells of an earlier end" in Page(render([run])).text
    write_state(folder, "finished")
    (folder / "summary.json").write_text(json.dumps(make_summary(updates=2)))
    assert load_run(folder).summary is None, "the run went on after update 2"


def test_a_folder_of_an_older_ddrl_is_said_to_be_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=2)
    (folder / "summary.json").write_text('{"ocr_before": 0.1}')
    (folder / "evaluations.jsonl").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 2, "reward": 0.1}\n')
    text = Page(render([load_run(folder)])).text
    assert text.count("written by an older ddrl") == 2


def test_a_gain_on_few_prompts_gets_no_verdict() -> None:
    entry = {"before": 0.1, "after": 0.9, "gain": 0.8, "stderr": 0.01, "ci95": [0.78, 0.82], "trained": True}
    assert measures({"prompts": 4, "rewards": {"ocr": entry}})[0].verdict == "too few prompts to say"
    assert measures({"prompts": 512, "rewards": {"ocr": entry | {"pairs": 29}}})[0].verdict == "too few prompts to say"
    assert measures({"prompts": 30, "rewards": {"ocr": entry}})[0].verdict == "clear gain"


def test_runs_of_other_rewards_and_sets_are_not_put_on_one_axis(tmp_path: Path) -> None:
    one, other, third = (make_run(tmp_path / name, name=name, updates=4) for name in "abc")
    for folder, old, new in ((other, '"rapidocr-1"', '"rapidocr-2"'), (third, "test-256", "test-512")):
        for name in ("summary.json", "evaluations.jsonl"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace(old, new).replace("dev-256", "dev-512" if folder is third else "dev-256"))
    runs = [load_run(folder) for folder in (one, other, third)]
    page = Page(render(runs))
    assert "not comparable: another revision of ocr (rapidocr-1, rapidocr-2)" in page.text
    assert "not comparable: another evaluation set (test-256, test-512)" in page.text
    assert "ocr of b" in page.text, "a panel of its own"
    assert "What the gain of" not in page.text
    page = Page(render(runs[:2]))
    assert "What the gain of scene.sharpness cost" in page.text
    compared = compare([("a", runs[0].summary or {}), ("c", runs[2].summary or {})])
    assert compared[1].ratio is None
    assert compared[1].apart is None


def test_warnings_failures_and_dead_groups_are_shown_with_their_first_reason(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:3]:
        line |= {"warnings": ["clip fraction 0.4 is above 0.2"], "failed_scores": {"ocr": 2}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = make_summary(updates=4) | {"dead_groups": {"count": 3, "first_reason": "scoring: no text"}, "missing": ["test at 4, ema"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    broken = eval_line(2, 0.5, "dev", "raw", 0.3, 0.01) | {"failed": {"jpeg": 5}, "first_failure": {"jpeg": "timeout: after 30 s"}}
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(broken) + "\n")
    page = Page(render([load_run(folder)]))
    for words in (
        "clip fraction 0.4 is above 0.2 (update 2 and 1 more)",
        "4 rollouts have no score of ocr.",
        "5 samples have no score of jpeg; the first: timeout: after 30 s",
        "3; the first: scoring: no text",
        "Evaluation test at 4, ema passed its deadline and is missing.",
    ):
        assert words in page.text, words


def test_clips_play_in_the_page_and_in_step(tmp_path: Path) -> None:
    """Inlined as everything else; the one script that keeps them in step is the only one that the policy allows."""
    folder = make_run(tmp_path / "run")
    before = render([load_run(folder)])
    assert "<video" not in before
    assert "<script" not in before
    assert "runs no scripts." in before
    for name in ("before", "after"):
        write_clip(folder / "samples" / f"{name}.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8.0)
    page = render([load_run(folder)])
    assert page.count('<video src="data:video/mp4;base64,') == 2
    assert "runs one script, which keeps its clips in step." in page
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script is not None
    allowed = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"media-src data:; script-src 'sha256-{allowed}'" in page
