"""`ddrl presample`: anchor data drawn from the policy of a recipe, as the paper's pre-sampled data.

A person's mistake is one line and exit status 2; a sample that could not be drawn, 1; stopped by Ctrl-C, 130. The same command goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.data import progress, summary
from trainer.cli.device import Device, usable
from trainer.cli.exits import fail
from trainer.cli.policy import policy_source
from trainer.cli.recipe import TinyFlag
from trainer.config.errors import ConfigError


def presample(
    source: Annotated[Path, typer.Argument(help="a recipe (what it starts from), a run folder (its newest export), or an exported policy", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder of the prepared set", show_default=False)],
    per_prompt: Annotated[int, typer.Option(min=1, help="samples of each prompt", show_default=False)],
    prompts: Annotated[
        int | None, typer.Option(min=1, help="how many of the recipe's prompts [default: all, where they are listed]", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps [default: sampler.eval_steps]", show_default=False)] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance [default: sampler.guidance]", show_default=False)] = None,
    ema: Annotated[bool, typer.Option("--ema", help="of a run: the averaged weights")] = False,
    seed: Annotated[int, typer.Option(help="seed of every noise")] = 0,
    shard_rows: Annotated[int, typer.Option(min=1, help="samples of a shard, rounded to whole prompts: what is drawn at once; of clips at most")] = 64,
    device: Device = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
    tiny: TinyFlag = False,
) -> None:
    """Draw anchor data from a policy: exactly N samples of each prompt, a prepared set. Run again after a stop, it goes on."""
    try:
        policy = policy_source(source, set_ or [], ema, tiny)
    except ConfigError as error:
        fail(str(error), 2)
    from actors.preparing.presampling import Presampling, PresamplingFailed, chosen
    from actors.preparing.presampling import presample as draw
    from actors.sources.draws import prompt_source
    from diffusion.checkpoint import load_policy
    from diffusion.engine.engine import StepFailed
    from diffusion.engine.request import SamplingFailed
    from diffusion.source import CheckpointError

    config, s, where = policy.config, policy.config.sampler, usable(device)
    try:
        examples = chosen(prompt_source(config.prompts, config.data), prompts)
        loaded = load_policy(config.model, where, config.seed)
        job = Presampling(
            out.resolve(),
            config.model,
            s,
            examples,
            per_prompt,
            shard_rows,
            steps or s.eval_steps,
            s.guidance if guidance is None else guidance,
            seed,
        )
        typer.echo(str(policy))
        with progress("shards") as told:
            manifest = draw(job, loaded, told)
    except (SamplingFailed, StepFailed, PresamplingFailed) as error:
        fail(str(error), 1)
    except (CheckpointError, ValueError) as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on with {out}", 130)
    typer.echo(summary(manifest, out))
