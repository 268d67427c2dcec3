"""What ranks are given and how what they find is compared: a policy, claims with real rollouts, trees of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from actors.groups import group_payload, group_request
from actors.payload import DataPayload, encode
from actors.weights.store import View
from actors.weights.table import complete
from actors.weights.transport import FolderTransport
from diffusion.checkpoint import load_policy, save_policy
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.families.glyph.policy import write_skeleton
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader
from tests.gloo import DEADLINE_S
from tests.unit.trainer.learn.given import SCENARIOS as GIVEN
from tests.unit.trainer.learn.given import Given
from tests.unit.trainer.learn.ranks import GROUPS, MEMBERS, scenario_of


def write_policy(folder: Path) -> None:
    """The glyph policy shrunk to one layer of width 32, every weight random: fresh ones have no gradient but in the last layer."""
    source = folder / "skeleton"
    write_skeleton(source)
    path = source / "transformer" / "config.json"
    small = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    path.write_text(json.dumps({**json.loads(path.read_text()), **small}))
    state = load_policy(ModelConfig(path=str(source), init=True)).transformer.state_dict()
    g = torch.Generator().manual_seed(0)
    save_policy(folder / "policy", source, {n: v + 0.05 * torch.randn(v.shape, generator=g) for n, v in state.items()})


def write_claim(folder: Path, name: str) -> None:
    """Real rollouts of odd groups, two of which lost a member, so that no two ranks have as many rows; sampled by slightly
    other weights, so that ratios are not 1."""
    scenario = scenario_of(name)
    if isinstance(scenario, Given):
        scenario.write_claim(folder, name)
        return
    config = scenario.config(folder)
    policy = load_policy(config.model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=g)
    sampler, rollout = config.sampler, config.rollout
    negative = policy.text_encoder.encode([sampler.negative_prompt])[0] if sampler.guidance != 1 else None
    texts = [f'a sign that says "{i}"' for i in range(GROUPS)]
    encoded = policy.text_encoder.encode(texts)
    requests = [group_request(sampler, rollout, 3, i, encoded[i], negative, scenario.shape, samples=config.objective.on_samples) for i in range(GROUPS)]
    done = Engine(policy.transformer, policy.process, 10_000).run(requests)
    payloads, groups = {}, []
    for i, (request, text) in enumerate(zip(requests, texts, strict=True)):
        members = [t for t in done if t.request is request][: MEMBERS - (i in (1, 3))]
        payloads[f"g{i}"] = list(encode(group_payload(members, text)))
        ocr, sharp = torch.rand(2, len(members), generator=g).tolist()
        totals = [float(a + b) for a, b in zip(ocr, sharp, strict=True)]
        groups.append(ClaimedGroup(i, GroupHeader(totals, len(members), 0, 0, "", scores={"ocr": totals}), f"g{i}"))
    rows = config.data_rows
    payloads["d"] = list(encode(DataPayload((texts[0],) * rows, torch.randn(rows, *scenario.shape, generator=g))))
    torch.save((Claim(1, 1, groups, [ClaimedData(1, "d", "")]), payloads), folder / f"claim-{name}.pt")


def numbers(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The numbers of a tree by their path."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, part in items for k, v in numbers(part, f"{path}/{key}").items()}
    return {path: torch.as_tensor(tree, dtype=torch.float64)}


def assert_same(found: Any, expected: Any, rtol: float = 1e-4, atol: float = 0.0) -> None:
    """Every number of both trees agrees, to `rtol` of the largest of its tensor plus `atol`."""
    a, b = numbers(found), numbers(expected)
    assert a.keys() == b.keys()
    for path, value in b.items():
        assert a[path].shape == value.shape, path
        error, size = (float(t.abs().max()) if t.numel() else 0.0 for t in (a[path] - value, value))
        assert error <= rtol * size + atol, f"{path}: off by {error:.2g} at {size:.2g}"


def assert_same_state(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, average and optimiser agree. Of moments in 8 bits the weights: where rounding of a gradient decides a code, the next one is
    a per cent of its block away. Of clips to 1e-9: a bias of keys moves no softmax, and what it gets as a gradient is rounding."""
    if name == "moments in 8 bits":
        found, expected = ({part: state[part] for part in ("model", "average")} for state in (found, expected))
        assert_same(found, expected, rtol=1e-3)
    else:
        assert_same(found, expected, atol=1e-9 if name == "clips" or name in GIVEN else 0.0)


def assert_same_updates(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Both groups of ranks say the same of their updates. Log-densities of about 5 in fp32 are known to some 1e-6."""
    assert_same(found, expected, atol=2e-6)
    for name in ("grad_norm", "data_loss", "lr"):
        assert_same([said[name] for said in found], [said[name] for said in expected])


def assert_handed_in(ranks: list[dict[str, Any]], transport: FolderTransport) -> None:
    """What ranks hand in is what they have trained, to the bit; of an adapter nothing else travels."""
    opened = View(complete([rank["published"] for rank in ranks]), transport, {}).open(DEADLINE_S)
    found = {n: torch.full(shape, torch.nan) for n, shape in opened.shapes.items()}
    for n, place, piece in opened.pieces():
        found[n][place].copy_(piece)
    trained = ranks[0]["state"]["model"]
    adapter = {n: t for n, t in trained.items() if ".lora_" in n}
    assert_same(found, adapter or trained, rtol=0)
