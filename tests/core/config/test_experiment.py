"""Configs: what ships validates, overrides, faults, and what the digest of the science leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.config.experiment import ExperimentConfig, load_config, load_places
from sapt_core.errors import ConfigError
from sapt_core.io.hashing import canonical_hash
from sapt_core.settings import GeneratorConfig

CONFIGS = Path(__file__).resolve().parents[3] / "pipelines/configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


# Comparisons and sweeps are files of another kind: test_compare.py and test_sweep.py in tests/pipelines validate them.
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_what_ships_validates(path: Path) -> None:
    config = load_config(path)
    assert ExperimentConfig.model_validate(config.model_dump()) == config


def test_configs_ship() -> None:
    assert {"quickstart", "superni_mini"} <= {path.stem for path in CONFIGS.glob("*.yaml")}


def test_overrides_win_and_keep_what_they_do_not_name() -> None:
    before = load_config(QUICKSTART)
    after = load_config(QUICKSTART, ["train.epochs=3", "pet.target_modules=q,v", "benchmark.tasks=[animal, loan]"])
    assert after.train.epochs == 3
    assert after.train.batch_size == before.train.batch_size
    assert after.pet.target_modules == ("q", "v")
    assert after.model_dump(mode="json")["benchmark"]["tasks"] == ["animal", "loan"]
    assert load_config(QUICKSTART, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["store.uri=elsewhere"],
        ["tracking.model=other"],
        ["cluster.train_workers=4"],
        ["train.checkpoint_every_steps=1"],
        ["backbone.path=moved"],
        ["diagnostics.forgetting=1", "diagnostics.transfer=1", "diagnostics.misalignment=1"],
        ["retention.train_rows=samples", "retention.sealed_rows=false"],
    ],
)
def test_the_digest_leaves_out_where_it_runs_and_lies(overrides: list[str]) -> None:
    assert load_config(QUICKSTART, overrides).digest() == load_config(QUICKSTART).digest()


@pytest.mark.parametrize(
    "overrides",
    [["seed=1"], ["train.epochs=1"], ["benchmark.order=2"], ["reflection.weight=1"], ["backbone.dtype=bfloat16"]],
)
def test_the_digest_counts_the_science(overrides: list[str]) -> None:
    assert load_config(QUICKSTART, overrides).digest() != load_config(QUICKSTART).digest()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_the_hash_does_not_see_the_order_of_keys(value: dict[str, object]) -> None:
    assert canonical_hash(value) == canonical_hash(dict(reversed(value.items())))


def test_the_hash_is_that_of_the_canonical_json() -> None:
    # sha256 of {"a":1,"b":[true,null]}
    expected = "1cc69c7fa23616ca2ec3ee70d24390a6"
    assert canonical_hash({"b": [True, None], "a": 1}).startswith(expected)


def test_places_stand_at_their_defaults_and_take_overrides() -> None:
    places = load_places([])
    assert (places.store.uri, places.tracking.model) == ("runs/store", "sapt")
    places = load_places(["store.uri=s3://bucket/prefix", "tracking.model=quickstart"])
    assert (places.store.uri, places.tracking.model) == ("s3://bucket/prefix", "quickstart")


def test_all_faults_of_places_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_places(["store.uri=http://x", "tracking.model=a b", "tracking.modl=x", "train.epochs=3"])
    assert {fault.partition(":")[0] for fault in caught.value.faults} == {
        "store.uri",
        "tracking.model",
        "tracking.modl",
        "train",
    }


def test_a_faulty_override_does_not_print_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        load_places(["tracking.uri=[https://user:secret@host", "store=secret"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_places(["tracking=https://user:secret@host"])
    assert "secret" not in str(caught.value)


def test_the_generator_adapts_what_the_block_does_unless_told_otherwise() -> None:
    synthetic = {"backbone": {"path": "x"}, "benchmark": {"suite": "synthetic"}}
    plain = ExperimentConfig.model_validate(synthetic)
    assert plain.generator == GeneratorConfig()
    wide = ExperimentConfig.model_validate({**synthetic, "pet": {"target_modules": ["a", "b"]}})
    assert wide.generator.pet == GeneratorConfig().pet.model_copy(update={"target_modules": ("a", "b")})
    assert not wide.generator.model_fields_set, "nobody set it, so nobody set it in vain"
    assert ExperimentConfig.model_validate(wide.model_dump()) == wide
    own = {**synthetic, "pet": {"target_modules": ["a"]}, "generator": {"pet": {"target_modules": ["c"]}}}
    assert ExperimentConfig.model_validate(own).generator.pet.target_modules == ("c",)
    prompts = ExperimentConfig.model_validate({**synthetic, "pet": {"type": "prompt"}})
    assert prompts.generator == GeneratorConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["retention.train_rows=statistics"],
            "reflection.source=generated keeps pseudo-samples of every task, and retention.train_rows=statistics "
            "forbids that: give reflection.source statistics or none, or retention.train_rows=samples",
        ),
        (
            ["retention.train_rows=samples", "reflection.source=memory"],
            "reflection.source=memory keeps real rows of every task, and retention.train_rows=samples forbids that: "
            "give reflection.source statistics, generated, given or none, or retention.train_rows=share",
        ),
        (
            ["retention.train_rows=share", "reflection.source=memory", "reflection.share=0.05"],
            "reflection.share=0.05 is above retention.share=0.02: lower the one or raise the other",
        ),
        (
            ["retention.train_rows=samples", "method.name=replay"],
            "method.name=replay keeps rows of every task, and retention.train_rows=samples forbids that: give another "
            "method, or retention.train_rows=share",
        ),
        (
            ["retention.train_rows=share", "method.name=multi_task"],
            "method.name=multi_task keeps a share of 1 of the rows, which is above retention.share=0.02: lower "
            "method.share, raise retention.share, or give another method",
        ),
    ],
)
def test_a_config_that_keeps_more_than_may_stay_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(QUICKSTART, given)
    assert refused.value.faults == (f"config: {said}",)


@pytest.mark.parametrize(
    "given",
    [
        ["retention.train_rows=statistics", "reflection.source=statistics"],
        ["retention.train_rows=statistics", "reflection.source=none"],
        ["retention.train_rows=statistics", "reflection.weight=0"],
        ["retention.train_rows=statistics", "method.name=ewc"],
        ["retention.train_rows=samples"],
        ["retention.train_rows=share", "reflection.source=memory"],
        ["retention.train_rows=share", "method.name=replay", "method.share=0.02"],
        ["method.name=multi_task"],
    ],
)
def test_what_keeps_no_more_than_may_stay_is_taken(given: list[str]) -> None:
    load_config(QUICKSTART, given)
