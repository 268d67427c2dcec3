"""The progress display, fed with made-up events. All numbers here are test data, not results."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from trainer.report.display import Display, summary_table
from trainer.report.progress import Progress, eval_line, sparkline, stage_words, update_line


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests run in: a dumb terminal has no live panel."""
    monkeypatch.setenv("TERM", "xterm")


SUMMARY = {
    "seed": 0,
    "prompts": 256,
    "rewards": {
        "ocr": {"before": 0.297, "after": 0.597, "gain": 0.3, "stderr": 0.012, "trained": True},
        "jpeg": {"before": -2.1, "after": -2.2, "gain": -0.1, "stderr": 0.2, "trained": False},
    },
    "sub_scores": {"ocr.exact_match": {"before": 0.06, "after": 0.3}},
    "diffusion_loss_before": 0.119,
    "diffusion_loss_after": 0.143,
    "diversity_before": 0.271,
    "diversity_after": None,
}


def update(step: int, reward: float = 0.3) -> dict[str, object]:
    return {
        "kind": "update",
        "step": step,
        "reward_mean": reward,
        "rewards": {"ocr": reward},
        "policy_loss": -0.002,
        "data_loss": 0.231,
        "grad_norm": 0.4,
        "staleness_mean": 0.25,
        "staleness_max": 1,
        "seconds": {"wait": 0.4, "train": 2.1, "publish": 0.1, "sample": 1.9},
        "groups": {"leased": 2, "ready": 4, "claimed": 8, "settled": 120, "evicted": 0, "dead": 3},
    }


def held_out(step: int, reward: float, loss: float, diversity: float, weights: str = "raw") -> dict[str, object]:
    return {
        "kind": "evaluation",
        "split": "dev",
        "step": step,
        "weights": weights,
        "rewards": {"ocr": reward, "jpeg": -2.0},
        "diffusion_loss": loss,
        "diversity": diversity,
    }


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(total: int, clock: Clock, least_gap_s: float = 1.0) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(total, "demo", title="ddrl, seed 0", console=Console(file=out), least_gap_s=least_gap_s, clock=clock), out


def test_without_a_terminal_there_is_one_plain_line_per_event() -> None:
    clock = Clock()
    display, out = plain(40, clock)
    with display:
        display.stage("starting Redis")
        clock.now += 3
        display.stage("loading weights")
        display.event(held_out(0, 0.3, 0.119, 0.27))
        for step in (1, 2):
            clock.now += 2
            display.event(update(step))
        display.event(held_out(2, 0.35, 0.1202, 0.268))
        display.event({"kind": "unknown"})
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.isascii()
    assert text.splitlines() == [
        "ddrl demo  ddrl, seed 0",
        "   0.0 s  starting Redis ..",
        "   3.0 s  loading weights ..",
        "held-out dev at 0, raw weights:  ocr 0.300  jpeg -2.000  diffusion loss 0.1190  diversity 0.2700",
        "update 1/40  ocr 0.300  policy loss -0.002  data loss 0.231  grad norm 0.4  staleness 0.25  "
        "seconds wait 0.4 train 2.1 publish 0.1 | sample 1.9  dead groups 3",
        "update 2/40  ocr 0.300  policy loss -0.002  data loss 0.231  grad norm 0.4  staleness 0.25  "
        "seconds wait 0.4 train 2.1 publish 0.1 | sample 1.9  dead groups 3  ETA 1 min 16 s",
        "held-out dev at 2, raw weights:  ocr 0.350 (+0.050)  jpeg -2.000 (+-0.000)  diffusion loss 0.1202 (+1.0 %)  diversity 0.2680 (-0.7 %)",
    ]


def test_how_generators_and_learner_compute_is_said_once() -> None:
    display, out = plain(2, Clock())
    learner = {"kind": "learner", "step": 0, "network": "bfloat16 on cuda:0, 2 ranks", "attention": "attention: xformers, which works on this GPU"}
    with display:
        display.event({"kind": "engine", "generator": "generator-0", "network": "bfloat16 on cuda:0", "attention": "attention: sdpa, which runs everywhere"})
        display.event(learner)
        display.event(learner)  # the ranks were started again
    assert out.getvalue().splitlines()[1:] == [
        "generator-0: bfloat16 on cuda:0; attention: sdpa, which runs everywhere",
        "learner: bfloat16 on cuda:0, 2 ranks; attention: xformers, which works on this GPU",
    ]


def test_fast_updates_are_thinned_out_but_the_last_one_shows() -> None:
    clock = Clock()
    display, out = plain(50, clock)
    with display:
        for step in range(1, 51):
            clock.now += 0.125
            display.event(update(step))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("update")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 9, 17, 25, 33, 41, 49, 50]
    assert lines[1].endswith("(+7 updates not shown)")
    assert "not shown" not in lines[-1]


def test_sft_updates_have_no_policy_words() -> None:
    progress = Progress(2)
    progress.add({"kind": "update", "step": 1, "data_loss": 0.2}, 0.0)
    assert update_line(progress) == "update 1/2  data loss 0.2"


def test_eta_follows_the_pace_and_survives_a_restart() -> None:
    progress = Progress(100)
    for step in range(1, 11):
        progress.add(update(step), now=float(step * 2))
    assert progress.seconds_left() == pytest.approx(180)
    progress.add(update(8), now=100.0)
    assert progress.seconds_left() is None
    progress.add(update(9), now=101.0)
    assert progress.seconds_left() == pytest.approx(91)


def test_trend_compares_the_last_ten_updates_with_the_ten_before() -> None:
    progress = Progress(100)
    for step in range(1, 20):
        progress.add(update(step, reward=0.1 * (step > 10)), now=float(step))
    assert progress.trend("ocr") is None
    progress.add(update(20, reward=0.1), now=20.0)
    assert progress.trend("ocr") == pytest.approx(0.1)


def test_held_out_changes_are_measured_from_the_first_raw_evaluation() -> None:
    progress = Progress(10)
    progress.add(held_out(0, 0.3, 0.100, 0.2), 0.0)
    progress.add(held_out(0, 0.9, 9.0, 9.0, weights="ema"), 0.0)
    progress.add(held_out(5, 0.4, 0.112, 0.19), 1.0)
    assert progress.held_out_change("diffusion_loss") == pytest.approx(0.12)
    assert progress.held_out_change("diversity") == pytest.approx(-0.05)
    assert progress.held_out_gain("ocr") == pytest.approx(0.1)
    assert "(+12.0" in eval_line(progress.held_out, progress)


def test_not_a_number_shows_as_absent() -> None:
    progress = Progress(10)
    progress.add(update(1) | {"reward_mean": float("nan"), "rewards": {"ocr": float("nan")}, "seconds": {"train": float("nan")}}, 0.0)
    assert "ocr" not in update_line(progress)
    assert "train —" in stage_words(progress.update)


@pytest.mark.parametrize(("values", "shown"), [([], ""), ([0.5, 0.5], "▁▁"), ([0.0, 0.5, 1.0], "▁▅█"), ([9.0, 0.0, 1.0], "▁█")])
def test_sparkline(values: list[float], shown: str) -> None:
    assert sparkline(values, width=2 if len(values) == 3 and values[0] == 9 else 30) == shown


def test_summary_table_rows_and_verdicts() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(summary_table(SUMMARY))
    text = out.getvalue()
    for words in (
        "256 held-out prompts",
        "ocr",
        "jpeg (held out)",
        "ocr.exact_match",
        "no clear change",
        "0.297",
        "0.597",
        "+0.300",
        "0.0120",
        "clear gain",
        "+20.2",
        "past the stop line",
        "+0.240",
    ):
        assert words in text, words
    diversity = next(line for line in text.splitlines() if "Diversity" in line)
    assert diversity.count("—") == 4


def test_summary_table_of_nothing_is_all_dashes() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table({}))
    assert out.getvalue().count("—") == 2 * 5


def test_panel_shows_every_part() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110, record=True)
    display = Display(40, "demo", title="ddrl, seed 0", console=console, clock=clock)
    display.stage("evaluating")
    display.event(held_out(0, 0.3, 0.119, 0.27))
    for step in range(1, 23):
        clock.now += 2
        display.event(update(step, reward=0.3 + step / 100))
    display.event(held_out(20, 0.35, 0.1202, 0.268))
    display.stage("saving")
    console.print(display._render())
    text = console.export_text()
    for words in (
        "demo",
        "ddrl, seed 0",
        "22/40",
        "55%",
        "ETA 36",
        "0.520",
        "▁",
        "▲ +0.100",
        "ocr 0.350 (+0.050)",
        "diffusion loss +1.0",
        "diversity −0.7",
        "dev, update 20",
        "train 2.1",
        "| sample 1.9",
        "mean 0.25, most 1",
        "leased 2",
        "settled 120",
        "dead 3",
        "saving",
        "44",
    ):
        assert words in text, words


def test_events_from_many_threads_do_not_lock_up() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)

    def feed() -> None:
        for step in range(1, 60):
            display.stage(f"stage {step}")
            display.event(update(step))
            print("a line of another thread")

    with Display(60, "demo", console=console) as display:
        display._live.refresh_per_second = 200  # type: ignore[union-attr]
        threads = [threading.Thread(target=feed, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def root_handler() -> Iterator[logging.StreamHandler]:  # type: ignore[type-arg]
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def test_log_handlers_are_borrowed_and_given_back(root_handler: logging.StreamHandler) -> None:  # type: ignore[type-arg]
    out = io.StringIO()
    bound = root_handler.stream

    def crash() -> None:
        with Display(3, "demo", console=Console(file=out, force_terminal=True)) as display:
            assert root_handler.stream is not bound
            display.stage("loading")
            logging.getLogger("some.library").warning("a warning of a library")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        crash()
    assert root_handler.stream is bound
    assert sys.stdout is bound
    assert "a warning of a library" in out.getvalue()
    assert "✗" in out.getvalue()


def test_on_a_real_terminal_foreign_lines_stay_whole(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(f"""
        import json, logging, sys, threading, time
        logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
        from trainer.report.display import Display
        def chatter():
            for i in range(30):
                print(f"WORKER-OUT {{i}} end")
                print(f"WORKER-ERR {{i}} end", file=sys.stderr)
                logging.info("%d end", i)
        with Display(30, "demo") as display:
            thread = threading.Thread(target=chatter); thread.start()
            for step in range(1, 31):
                display.event(json.loads('{json.dumps(update(1))}') | {{"step": step}}); time.sleep(0.01)
            thread.join(10)
            display.finish({{"rewards": {{"ocr": {{"before": 0.1, "after": 0.2, "stderr": 0.01}}}}}})
    """))  # fmt: skip
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "40",
                   "PYTHONPATH": str(Path(__file__).parents[4]), "PYTHONUTF8": "1"}  # fmt: skip
    process = subprocess.Popen([sys.executable, script], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    seen = bytearray()
    try:
        while chunk := os.read(leader, 65536):
            seen += chunk
    except OSError:  # Linux answers EIO once the other side has closed
        pass
    os.close(leader)
    assert process.wait(timeout=10) == 0
    text = seen.decode()
    for kind in ("WORKER-OUT", "WORKER-ERR", "LOG"):
        assert all(f"{kind} {i} end" in text for i in range(30)), kind
    assert "30/30" in text
    assert "clear gain" in text


def test_several_rewards_are_shown_by_name_beside_their_total() -> None:
    progress = Progress(4)
    line = update(1) | {"reward_mean": 0.46, "rewards": {"ocr": 0.3, "scene.sharpness": 1.6}, "failed_scores": {"ocr": 2}}
    progress.add(line, 0.0)
    text = update_line(progress)
    assert text.startswith("update 1/4  reward 0.460  ocr 0.300  scene.sharpness 1.600  policy loss")
    assert "no score of ocr 2" in text
    console = Console(file=io.StringIO(), force_terminal=True, width=110, record=True)
    display = Display(4, "demo", console=console)
    display.event(line)
    console.print(display._render())
    assert "scene.sharpness" in console.export_text()


def test_a_resumed_run_says_so_and_tells_nothing_twice() -> None:
    clock = Clock()
    display, out = plain(40, clock)
    with display:
        display.resume(20, [held_out(0, 0.3, 0.1, 0.27), *(update(step) for step in range(1, 21))])
        for step in (19, 20, 21):
            display.event(update(step))
        display.event(held_out(21, 0.4, 0.11, 0.27))
    lines = out.getvalue().splitlines()
    assert lines[1].endswith("Resuming at update 20 of 40 ..")
    assert [line.split("  ")[0] for line in lines[2:]] == ["update 21/40", "held-out dev at 21, raw weights:"]
    assert "ocr 0.400 (+0.100)" in lines[3], "compared with the evaluation before the resume"


def test_no_update_is_counted_beyond_the_total() -> None:
    progress = Progress(3)
    progress.add(update(4), 0.0)
    assert update_line(progress).startswith("update 4/4 ")


def test_warnings_are_told_once_and_again_at_the_end() -> None:
    display, out = plain(40, Clock(), least_gap_s=0)
    with display:
        for step in (1, 2):
            display.event(update(step) | {"warnings": ["clip fraction 0.4 is above 0.2"]})
        assert out.getvalue().count("warning at update 1: clip fraction 0.4 is above 0.2") == 1
        display.finish(SUMMARY | {"dead_groups": {"count": 3, "first_reason": "scoring: no text"}, "missing": ["test at 40"]})
    text = out.getvalue()
    assert text.count("warning at update 1: clip fraction 0.4 is above 0.2") == 2
    assert "Dead groups: 3; the first: scoring: no text" in text
    assert "Evaluation test at 40 passed its deadline and is missing." in text
