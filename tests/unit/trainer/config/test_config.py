"""Configuration: what is understood, what is refused, and how a refusal reads."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.source import is_hub_id
from trainer.config.errors import ConfigError
from trainer.config.load import all_keys, apply_overrides, load_config, nearest_key, parse_config
from trainer.config.presets import PRESETS
from trainer.config.render import render_config
from trainer.config.run import RunConfig

# rewards.yaml is a fleet for `ddrl serve`, not a run
RECIPES = sorted(p for p in (Path(__file__).resolve().parents[4] / "recipes").glob("*.yaml") if p.name != "rewards.yaml")
KEYS = all_keys()


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(tree)
    message = str(error.value)
    assert "\n" not in message
    return message


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def leaves() -> list[str]:
    return [k for k in KEYS if not any(other.startswith(k + ".") for other in KEYS)]


# -- reading --------------------------------------------------------------------------------------------------------


def test_an_empty_tree_is_the_default_run() -> None:
    config = parse_config({})
    assert config == RunConfig()
    assert config.objective.preset == "ddrl"
    assert config.uses_policy
    assert config.uses_data
    assert config.data_rows == config.rollout.groups_per_step * config.rollout.group_size


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_named_like_its_file(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    assert is_hub_id(config.model.path) or (recipe.parents[1] / config.model.path).is_dir()


def test_recipes_exist() -> None:
    assert {"glyph-base", "glyph-ocr"} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_weights_and_keys_beside_it_win(preset: str) -> None:
    plain = parse_config({"objective": {"preset": preset}}).objective
    for key, value in PRESETS[preset].objective.items():
        assert getattr(plain, key) == value
    changed = parse_config({"objective": {"preset": preset, "data_weight": 0.5}}).objective
    assert changed.data_weight == 0.5
    assert changed.policy_weight == plain.policy_weight


def test_the_presets_are_the_published_compositions() -> None:
    parts = {p: parse_config({"objective": {"preset": p}}) for p in PRESETS}
    assert {p: (c.uses_policy, c.objective.kl_weight > 0, c.uses_data) for p, c in parts.items()} == {
        "ddrl": (True, False, True),
        "ddrl_cosmos": (True, False, True),
        "flow_grpo": (True, True, False),
        "flow_grpo_2025_06": (True, True, False),
        "flow_grpo_fast": (True, False, False),
        "flow_cps": (True, True, False),
        "grpo_guard": (True, False, False),
        "dance_grpo": (True, False, False),
        "mix_grpo": (True, False, False),
        "diffusion_nft": (True, True, False),
        "awm": (True, True, False),
        "sft": (False, False, True),
    }


def test_rows_of_the_data_term_without_rollouts_are_free() -> None:
    assert parse_config({"objective": {"preset": "sft"}, "data": {"batch_size": 7}}).data_rows == 7


# -- misspelt keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("updtes", "updates"),
        ("objectve", "objective"),
        ("objective.dataweight", "objective.data_weight"),
        ("sampler.noise-level", "sampler.noise_level"),
        ("fleet.start_timeout", "fleet.start_timeout_s"),
        ("replay.max_stalenes", "replay.max_staleness"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, meant: str) -> None:
    assert refused(nested(key, 1)) == f"unknown key '{key}'; did you mean '{meant}'?"
    with pytest.raises(ConfigError) as error:
        apply_overrides({}, [f"{key}=1"])
    assert str(error.value) == f"unknown key '{key}'; did you mean '{meant}'?"


def test_a_key_like_no_other_is_told_where_to_look() -> None:
    assert refused({"qqqq": 1}) == "unknown key 'qqqq'; `ddrl config RECIPE` lists all keys"


@given(key=st.sampled_from([k for k in KEYS if len(k) > 4]), place=st.integers(0, 60))
@settings(max_examples=150)
def test_a_dropped_letter_is_forgiven(key: str, place: int) -> None:
    """The suggestion is a real key at least as like the typo as the key that was meant."""
    place %= len(key)
    typo = key[:place] + key[place + 1 :]
    if typo in KEYS:
        return
    found = nearest_key(typo)
    assert found in KEYS

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, typo, other).ratio()

    assert likeness(str(found)) >= likeness(key) - 0.02


# -- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_go_deep() -> None:
    tree = {"sampler": {"steps": 5, "trained_steps": 2}, "name": "a"}
    result = apply_overrides(tree, ["sampler.steps=8", "sampler.trained_steps=[0, 3]", "optimizer.lr=1e-3", "data.batch_size=null", "fleet.port=4"])
    assert result == {
        "sampler": {"steps": 8, "trained_steps": [0, 3]},
        "name": "a",
        "optimizer": {"lr": "1e-3"},
        "data": {"batch_size": None},
        "fleet": {"port": 4},
    }
    assert tree == {"sampler": {"steps": 5, "trained_steps": 2}, "name": "a"}
    config = parse_config(result)
    assert config.optimizer.lr == 1e-3  # YAML reads 1e-3 as text
    assert config.sampler.trained_steps == [0, 3]


def test_the_last_of_two_overrides_wins_and_a_section_can_be_replaced() -> None:
    assert apply_overrides({}, ["seed=1", "seed=2"]) == {"seed": 2}
    assert apply_overrides({"objective": {"clip": 0.1}}, ["objective={preset: sft}"]) == {"objective": {"preset": "sft"}}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_the_command_line_wins_over_the_file(preset: str) -> None:
    """A recipe that names `data_weight` must not stay a mixture under another preset's name."""
    recipe = {"objective": {"preset": "ddrl", "data_weight": 0.02, "kl_weight": 0.1, "advantage_scale": "group", "clip": 0.5, "exponential_advantage": True}}
    config = parse_config(apply_overrides(recipe, [f"objective.preset={preset}"])).objective
    plain = parse_config({"objective": {"preset": preset}}).objective
    assert config == plain.model_copy(update={"exponential_advantage": True})  # what is no part of a composition stays
    beside = apply_overrides(recipe, ["objective.data_weight=0.3", f"objective.preset={preset}"])
    assert parse_config(beside).objective.data_weight == 0.3  # a key that is given beside it wins


def test_the_names_of_rewards_are_ones_own() -> None:
    tree = {"rewards": {"ocr": {"weight": 1.0}}}
    changed = apply_overrides(
        tree, ["rewards.scene.sharpness.weight=0.1", "rewards.ocr.clip=[0, 1]", "fleet.rewards.ocr.kind=ocr", "fleet.rewards.ocr.mode=strict"]
    )
    assert changed == {
        "rewards": {"ocr": {"weight": 1.0, "clip": [0, 1]}, "scene.sharpness": {"weight": 0.1}},
        "fleet": {"rewards": {"ocr": {"kind": "ocr", "mode": "strict"}}},
    }
    config = parse_config({**changed, "held_out_rewards": ["jpeg", "scene.contrast"]})
    assert config.reward_names == ["ocr", "scene", "jpeg"]
    assert parse_config(yaml.safe_load(render_config(config))) == config
    with pytest.raises(ConfigError, match=r"unknown key 'rewards\.ocr\.wieght'"):
        apply_overrides(tree, ["rewards.ocr.wieght=1"])


def test_training_without_rollouts_needs_no_reward() -> None:
    assert parse_config({"objective": {"preset": "sft"}, "rewards": {}}).reward_names == []


def test_own_pairs_need_no_feeder() -> None:
    assert parse_config({}).feeds_data
    own = parse_config({"data": {"pairing": "own"}})
    assert own.uses_data
    assert not own.feeds_data


def test_a_value_may_hold_an_equals_sign() -> None:
    assert apply_overrides({}, ["redis.url=redis://host:1/0?x=y"]) == {"redis": {"url": "redis://host:1/0?x=y"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("seed=[", "override 'seed=[': the value is not YAML"),
        ("model.path=x", "override 'model.path=x': 'model' is not a section in this recipe"),
    ],
)
def test_override_refusals(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides({"model": 3}, [override])
    assert str(error.value) == message


# -- rendering ------------------------------------------------------------------------------------------------------

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["1", "null", "1.5", "a.b", "yes", "2024-01-01", "0x10"]),
        "seed": st.integers(0, 2**31 - 1),
        "objective": st.fixed_dictionaries({"preset": st.sampled_from(sorted(PRESETS)), "clip": st.floats(1e-12, 10)}),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-12, 1), "betas": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list)}),
        "prompts": st.fixed_dictionaries({"kind": st.just("file"), "path": st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)}),
        "model": st.fixed_dictionaries({"path": st.sampled_from(["a b", "# x", "x: y", "'", '"', "~", "é/ü", "[1]", "- a", "&b", "a\\n"])}),
        "sampler": st.fixed_dictionaries({"steps": st.just(9), "trained_steps": st.one_of(st.integers(1, 8), st.just([0, 7]))}),
    },
)


@given(tree=CHANGES)
@settings(max_examples=25)
def test_a_rendered_configuration_reads_back_the_same(tree: dict[str, Any]) -> None:
    config = parse_config(tree)
    assert parse_config(yaml.safe_load(render_config(config))) == config


def test_every_key_is_rendered_once_with_its_description() -> None:
    lines = render_config(RunConfig()).splitlines()
    for key in leaves():
        name = key.split(".")[-1]
        assert any(line.strip().startswith(f"{name}:") and "  # " in line for line in lines), key
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) == len(KEYS)


@pytest.mark.parametrize("url", ["redis://:s3cr3t@host:6379/0", "rediss://user:s3cr3t@host/1", "redis://:s3c@r3t@host/0", "redis://host/0?password=s3cr3t"])
def test_a_password_is_neither_shown_nor_stored(url: str) -> None:
    text = render_config(parse_config({"redis": {"url": url}}))
    assert "s3c" not in text
    assert "r3t" not in text
    assert "host" in text


def test_hiding_passwords_leaves_descriptions_alone() -> None:
    assert "else redis://[:password@]host:port/db" in render_config(RunConfig())


# -- refusals -------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"updates": 0}, "updates: Input should be greater than or equal to 1 (got 0)"),
    ({"seed": -1}, "seed: "),
    ({"name": "../x"}, "name: "),
    ({"name": ""}, "name: "),
    ({"objective": {"preset": "ppo"}}, "objective.preset: "),
    ({"objective": {"policy_weight": 0, "data_weight": 0}}, "objective: policy_weight and data_weight are both 0: nothing would be learnt"),
    ({"objective": {"preset": "sft", "kl_weight": 0.1}}, "objective: kl_weight needs rollouts; set policy_weight > 0"),
    ({"objective": {"clip": 0}}, "objective.clip: "),
    ({"objective": {"log_prob": "sum"}}, "objective.log_prob: "),
    ({"data": {"batch_size": 5}}, "data.batch_size=5 must equal the rollouts per update (128 = groups_per_step x group_size)"),
    ({"objective": {"preset": "sft", "data_noise": "shared"}}, "objective.data_noise=shared needs rollouts; use fresh"),
    ({"ray": {"address": "auto"}}, "redis.url=embedded listens on this machine only"),
    ({"redis": {"url": "http://x"}}, "redis.url: "),
    ({"sampler": {"steps": 4, "trained_steps": 4}}, "sampler: trained_steps=4 must lie in 1..3"),
    ({"sampler": {"steps": 4, "trained_steps": [3]}}, "sampler: trained_steps=[3] must be distinct indices in 0..2"),
    ({"sampler": {"trained_steps": [1], "trained_choice": "window"}}, "sampler: trained_choice=window needs a number of trained_steps"),
    ({"prompts": {"kind": "file"}}, "prompts: prompts.kind=file needs prompts.path"),
    ({"data": {"kind": "folder"}}, "data: data.kind=folder needs data.path"),
    ({"rollout": {"group_size": 0}}, "rollout.group_size: "),
    ({"rollout": {"group_size": 1}, "objective": {"advantage_scale": "batch"}}, "rollout.group_size=1 leaves every advantage at 0"),
    ({"rollout": {"group_size": 1}, "objective": {"advantage_std": "biased"}}, "rollout.group_size=1 leaves every advantage at 0"),
    ({"rollout": {"group_size": 1}, "replay": {"drop_zero_variance": True}}, "replay.drop_zero_variance=true drops every group"),
    ({"objective": {"preset": "sft", "data_per": "first"}}, "objective.data_per=first evaluates at a rollout's first trained step"),
    ({"rewards": {}}, "rewards is empty, and rollouts are trained on rewards"),
    ({"rewards": {"hps": {}}}, "hps"),
    ({"rewards": {"ocr": {"weight": 0}}}, "rewards.ocr: weight is 0: name it under held_out_rewards instead"),
    ({"rewards": {"ocr": {"clip": [1, 0]}}}, "rewards.ocr: clip [1.0, 0.0] must be [low, high] with low below high"),
    ({"rewards": {"ocr.": {}}}, "'ocr.' names no reward"),
    ({"held_out_rewards": ["ocr"]}, "held_out_rewards names 'ocr', which is trained on"),
    ({"fleet": {"url": "ftp://x"}}, "fleet.url: "),
    ({"data": {"pairing": "own"}, "objective": {"preset": "sft"}}, "data.pairing=own pairs anchor data with rollouts, and there are none"),
    ({"data": {"pairing": "own"}, "prompts": {"kind": "glyph"}}, "data.pairing=own needs prompts with pictures, but prompts.kind=glyph"),
    ({"optimizer": {"ema": 1.0}}, "optimizer.ema: "),
    ({"optimizer": {"lr": "fast"}}, "optimizer.lr: "),
    ({"learner": {"ranks": 0}}, "learner.ranks: "),
    ({"learner": {"ranks": 6, "replicas": 4}}, "learner: ranks=6 is no multiple of replicas=4"),
    ({"learner": {"ranks": 6, "sequence_ranks": 4}}, "learner: 6 ranks of a replica are no multiple of sequence_ranks=4"),
    ({"learner": {"ranks": 8, "replicas": 4, "sequence_ranks": 4}}, "learner: 2 ranks of a replica are no multiple of sequence_ranks=4"),
    (
        {"rollout": {"sequence_ranks": 2, "gpus": 0.5}},
        "rollout: each of rollout.sequence_ranks=2 processes needs a whole GPU (NCCL refuses two on one), not 0.5",
    ),
    ({"model": None}, "model: "),
    # losses on finished rollouts
    ({"sampler": {"noise_on": "none"}}, "sampler.noise_on=none leaves no step with a density, which objective.policy_loss=ratio needs"),
    ({"objective": {"policy_loss": "nft", "kl_weight": 0.1}}, "kl_scale=step divides by the noise of a step, and policy_loss=nft knows none"),
    ({"objective": {"preset": "ddrl", "old_decay": 0.5}}, "old_decay belongs to policy_loss=nft or awm"),
    ({"objective": {"preset": "ddrl", "old_kl_weight": 0.5}}, "old_kl_weight belongs to policy_loss=nft or awm"),
    ({"objective": {"preset": "awm", "old_kl_weight": 0}}, "policy_loss=awm uses its old policy for old_kl_weight alone, which is 0"),
    ({"objective": {"preset": "awm", "old_decay": 0}}, "old_kl_weight=1 needs an old policy"),
    ({"objective": {"preset": "diffusion_nft"}, "sampler": {"guidance": 4.5}}, "objective.policy_loss=nft fits the network itself to what was sampled"),
    # several updates of a claim
    ({"objective": {"preset": "sft"}, "learner": {"updates_per_claim": 2}}, "learner.updates_per_claim=2 cuts the groups of a step, and there are no rollouts"),
    ({"objective": {"preset": "awm"}, "learner": {"updates_per_claim": 2}}, "objective.policy_loss=awm takes its ratio to the policy of the same update"),
    ({"rollout": {"groups_per_step": 3}, "learner": {"ranks": 1, "updates_per_claim": 4}}, "leave 0 rollouts to an update, fewer than the 1 ranks"),
    ({"rollout": {"groups_per_step": 4, "group_size": 2}, "learner": {"ranks": 3, "updates_per_claim": 4}}, "leave 2 rollouts to an update, fewer than the 3"),
    ({"objective": {"center_ratio": True}}, "it needs policy_loss=ratio and old_log_prob=learner"),
    # every rank needs a rollout and an anchor row: known before anything is started
    ({"rollout": {"groups_per_step": 1, "group_size": 2}, "learner": {"ranks": 3}}, "learner.ranks"),
    ({"rollout": {"groups_per_step": 1, "group_size": 4, "min_group_size": 2}, "learner": {"ranks": 3}}, "learner.ranks"),
    ({"objective": {"preset": "sft"}, "data": {"batch_size": 2}, "learner": {"ranks": 3}}, "learner.ranks"),
    ({"rollout": {"groups_per_step": 1, "group_size": 2}, "learner": {"ranks": 6, "sequence_ranks": 2}}, "learner.ranks=6 / sequence_ranks=2 exceeds the 2"),
]


@pytest.mark.parametrize(("tree", "message"), REFUSALS, ids=lambda v: str(v)[:60])
def test_settings_that_cannot_work_are_refused_in_one_line(tree: dict[str, Any], message: str) -> None:
    assert message in refused(tree)


@pytest.mark.parametrize("key", ["sampler.trained_steps", "fleet.port", "optimizer.betas", "optimizer.lr", "data.batch_size", "redis.url"])
def test_a_refusal_starts_with_the_key_as_it_is_written_in_a_recipe(key: str) -> None:
    """Nobody can look up `sampler.trained_steps.int`, a name of the validator's own."""
    assert refused(nested(key, {"no": "value"})).split(":")[0] == key


def test_several_faults_are_counted() -> None:
    assert refused({"updates": 0, "seed": -1, "checkpoint_every": 0}).endswith("(and 2 more)")


def test_settings_do_not_change_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"recipe .*x.yaml cannot be read: No such file or directory"),
        (b"a: [", r"recipe .*x.yaml is not YAML: "),
        (b"model: {path: a}\nsampler: {steps: 4,\n  steps: 5}", r"recipe .*x.yaml is not YAML: the key 'steps' stands twice.* line 3"),
        (b"- a\n- b\n", r"recipe .*x.yaml must be a mapping of settings"),
        (b"", r"recipe .*x.yaml must be a mapping of settings"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", r"recipe .*x.yaml "),
    ],
)
def test_a_recipe_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)
