"""`ddrl serve`, `ddrl score` and `ddrl rewards …`: the reward service from a shell.

A person's mistake is one line and exit status 2; an item without a score, or a service that does not answer, 1.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trainer.run.environment import prepare

if TYPE_CHECKING:
    from services.config import FleetConfig
    from services.rest.schemas import MultiScoreResponse

# What `ddrl serve` runs without a file; recipes/rewards.yaml is the same with comments.
DEFAULT = {
    "rewards": {
        "ocr": {"kind": "ocr", "mode": "strict", "reading": "detection", "upscale": 1, "replicas": {"min": 1, "max": 2}},
        "jpeg": {"kind": "jpeg"},
        "scene": {"kind": "scene"},
    },
    "redis_url": "embedded",
}

CONNECT_S = 3.0  # a service that takes no connection for so long is not there

rewards = typer.Typer(no_args_is_help=True, help="The reward models of a rewards.yaml.")
FleetFile = Annotated[Path | None, typer.Argument(metavar="[REWARDS.YAML]", help="the fleet [default: ocr, jpeg and scene on the CPU]", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Put these commands into ``app``."""
    app.command()(serve)
    app.command()(score)
    app.add_typer(rewards, name="rewards")


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"ddrl: {' '.join(message.split())}", err=True)
    raise typer.Exit(status)


def _fleet(file: Path | None) -> FleetConfig:
    from services.config import FleetConfigError
    from services.fleet.file import parse_fleet, read_fleet

    try:
        return parse_fleet(DEFAULT) if file is None else read_fleet(file)
    except FleetConfigError as error:
        _fail(str(error), 2)


def serve(
    file: FleetFile = None,
    port: Annotated[int | None, typer.Option(help="port; 0 takes a free one [default: 8000, or the file's]", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; anything but loopback needs keys", show_default=False)] = None,
    keys_file: Annotated[Path | None, typer.Option(help="file of bearer keys", show_default=False)] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis of the jobs: redis://…, or embedded", show_default=False)] = None,
) -> None:
    """Serve rewards over REST on this machine. Ctrl-C or SIGTERM finishes what was accepted, then stops with status 0."""
    from services.config import FleetConfigError
    from services.rest.auth import KeysError
    from trainer.cli.rewards_service import Stopped, overridden, serve_fleet
    from trainer.run.errors import RunFailed

    config = _fleet(file)
    try:
        config = overridden(config, port=port, host=host, keys_file=keys_file.absolute() if keys_file else None, redis_url=redis_url)
        prepare(None)
        serve_fleet(
            config,
            starting=lambda: typer.echo("starting the rewards: " + ", ".join(config.rewards)),
            ready=lambda url: _announce(url, config),
            stopping=lambda: typer.echo("stopping: finishing what was accepted"),
        )
    except (FleetConfigError, KeysError) as error:
        _fail(str(error), 2)
    except RunFailed as error:
        _fail(str(error), 1)
    except Stopped as stopped:
        _fail(str(stopped), stopped.status)


def _announce(url: str, config: FleetConfig) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("reward", "kind", "device", "replicas", "batch", box=SIMPLE_HEAD)
    for name, reward in config.rewards.items():
        low, high = reward.replicas.min, reward.replicas.max
        table.add_row(name, reward.kind, reward.device, str(low) if low == high else f"{low} to {high}", f"{reward.batch_items} items")
    console = Console()
    console.print(table)
    keys = "keys are required" if config.keys_file or os.environ.get("DDRL_REWARD_KEYS") else "no keys: for this machine only"
    console.print(f"ready: {url}  ({keys}; jobs {'are kept' if config.redis_url else 'are not kept'}; Ctrl-C stops)", highlight=False, soft_wrap=True)


def score(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="PNG, JPEG, WebP, mp4 or npy", show_default=False)],
    reward: Annotated[list[str], typer.Option(help="reward to ask; may be repeated")] = ["ocr"],  # noqa: B006
    prompt: Annotated[str, typer.Option(help="prompt the media were made from")] = "",
    url: Annotated[str | None, typer.Option(help="reward service to ask; without it the rewards run in this process", show_default=False)] = None,
    key_env: Annotated[str | None, typer.Option(help="environment variable that holds the service's key", show_default=False)] = None,
    fleet: Annotated[Path | None, typer.Option(help="rewards.yaml that says what the rewards are, without --url", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait for the answer")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="print the service's answer instead of a table")] = False,
) -> None:
    """Score files with one reward or several."""
    from services.client.base import RewardError

    try:
        data = [(path.name, path.read_bytes()) for path in files]
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", 2)
    key = os.environ.get(key_env) if key_env else None
    if key_env and not key:
        _fail(f"--key-env names {key_env}, which is not set", 2)
    try:
        answer = _remote(url, key, reward, prompt, data, timeout) if url else _here(_fleet(fleet), reward, prompt, data, timeout)
    except RewardError as error:
        _fail(str(error), 1)
    if json:
        typer.echo(answer.model_dump_json(exclude_none=True))
    else:
        _show([path.name for path in files], answer)
    if any(result.error is not None for each in answer.rewards.values() for result in each.results):
        raise typer.Exit(1)


def _remote(url: str, key: str | None, reward: list[str], prompt: str, data: list[tuple[str, bytes]], timeout: float) -> MultiScoreResponse:
    from contextlib import closing

    from services.client.rest import RestRewardClient
    from services.client.wire import Keys

    with closing(RestRewardClient(url, api_key=key, connect_s=CONNECT_S, keys=Keys("--url", "--key-env", "--timeout"))) as client:
        return client.score_files(list(dict.fromkeys(reward)), [prompt] * len(data), data, timeout)


def _here(config: FleetConfig, reward: list[str], prompt: str, data: list[tuple[str, bytes]], timeout: float) -> MultiScoreResponse:
    import asyncio

    from services.errors import ProblemError
    from services.fleet.local_backend import LocalBackend
    from services.media.decode import plan
    from services.media.plan import Upload
    from services.rest.metrics import FleetMetrics
    from services.rest.requests import ScoreCall
    from services.rest.schemas import MultiScoreResponse, ScoreOptions
    from services.rest.scoring import Scoring

    names = list(dict.fromkeys(reward))
    for name in names:
        if name not in config.rewards:
            _fail(f"no reward {name!r}; there is {', '.join(config.rewards)}", 2)
    backend = LocalBackend({name: config.rewards[name] for name in names})
    call = ScoreCall(ScoreOptions(rewards=names), [prompt] * len(data), [plan(Upload(each)) for _, each in data])
    try:
        answer = asyncio.run(Scoring(backend, config.limits, FleetMetrics()).answer(call, timeout))
    except ProblemError as error:
        _fail(f"{error.detail} ({error.code})", 1)
    assert isinstance(answer, MultiScoreResponse), "rewards were named"
    return answer


def _show(names: list[str], answer: MultiScoreResponse) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("file", "reward", "score", "sub-scores", box=SIMPLE_HEAD)
    for reward, given in answer.rewards.items():
        for name, result in zip(names, given.results, strict=True):
            if result.error is not None:
                table.add_row(escape(name), reward, "–", escape(f"{result.error.code}: {result.error.message}"), style="red")
            else:
                parts = [f"{sub} {value:.4g}" for sub, value in (result.scores or {}).items()]
                read = [f"read {result.text!r}"] if result.text is not None else []
                table.add_row(escape(name), reward, f"{result.reward:.4g}", escape(", ".join(parts + read)))
    console = Console()
    console.print(table)
    for reward, given in answer.rewards.items():
        console.print(f"{reward}: {escape(given.revision)}", style="dim", highlight=False)


@rewards.command("list")
def list_kinds() -> None:
    """The kinds of rewards that a rewards.yaml may name."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from services.scorers.registry import BUILT_IN, settings_class

    table = Table("kind", "what it scores", box=SIMPLE_HEAD)
    for kind in BUILT_IN:
        table.add_row(kind, (settings_class(kind).__doc__ or "").strip().splitlines()[0])
    table.add_row("module:Class", "a scorer of your own")
    Console().print(table)


@rewards.command("self-test")
def self_test(
    file: FleetFile = None, only: Annotated[list[str] | None, typer.Option(help="only this reward; may be repeated", show_default=False)] = None
) -> None:
    """Load every reward in this process and check that it gives its known answer."""
    from services.scorers.registry import build_scorer

    config, failed = _fleet(file), False
    for name in only or config.rewards:
        if name not in config.rewards:
            _fail(f"no reward {name!r}; there is {', '.join(config.rewards)}", 2)
        started = time.monotonic()
        try:
            scorer = build_scorer(config.rewards[name])
            scorer.self_test()
        except Exception as error:  # whatever a scorer raises, it is unfit, and the others are still tested
            failed = True
            typer.echo(f"{name}: FAILED: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            typer.echo(f"{name}: ok in {time.monotonic() - started:.1f} s, {scorer.revision}")
    if failed:
        raise typer.Exit(1)


@rewards.command("convert-videoalign")
def convert_videoalign(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder of a published or self-trained checkpoint", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="folder to write", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="folder of the base Qwen2-VL model, for an adapter checkpoint", show_default=False)] = None,
    template: Annotated[Path | None, typer.Option(help="VideoAlign's prompt_template.py, or the template as text", show_default=False)] = None,
) -> None:
    """Make a safetensors folder of a VideoAlign checkpoint, once; serving then needs neither pickles nor LoRA."""
    from services.scorers.videoalign.convert import convert
    from services.scorers.videoalign.errors import CheckpointError

    try:
        report = convert(source, destination, base=base, template=template)
    except (CheckpointError, OSError, ValueError) as error:
        _fail(str(error), 2)
    typer.echo(
        f"{report.destination}: {report.tensors_out} tensors, {report.bytes_out / 1e9:.2f} GB {report.dtype} from {report.tensors_in} tensors "
        f"({report.layout}), {report.folded_updates} LoRA updates folded, xxh3 {report.xxh3}"
    )
