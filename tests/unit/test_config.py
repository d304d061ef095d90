"""Settings: types, order of force, strict keys."""

from dataclasses import fields

import pytest

from aura_dist.config import (
    VERBS,
    CollectConfig,
    EvaluateConfig,
    FitConfig,
    GenerateConfig,
    describe,
    hints,
    merge,
    resolve,
)
from aura_dist.errors import ConfigError

COLLECT = {"model": "m", "data": "d.csv", "concepts": ["toxic"], "store": "s.zarr"}


def collect(**settings):
    return resolve(CollectConfig, {**COLLECT, **settings})


def test_flags_beat_sections_and_sections_beat_the_top():
    document = {"seed": 1, "max_tokens": 1, "model": "top", "collect": {"max_tokens": 2, "model": "section"}}
    merged = merge("collect", document, {"model": "flag"})
    assert merged == {"seed": 1, "max_tokens": 2, "model": "flag"}


def test_top_keys_of_other_verbs_are_allowed_and_not_taken():
    assert merge("score", {"model": "m", "store": "s"}, {}) == {"store": "s"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"tokens_batch": 1}, "unknown key 'tokens_batch'; did you mean 'tokens_per_batch'"),
        ({"max-tokens": 4}, "unknown key 'max-tokens'; did you mean 'max_tokens'"),
        ({"collect": {"top_k": 3}}, "section 'collect': unknown key 'top_k'"),
        ({"collect": 3}, "section 'collect': expected keys and values, got 3"),
        ({"fit": {"concept": "a"}, "zzz": 1}, "unknown key 'zzz'; known keys: "),
    ],
)
def test_unknown_keys_are_errors(document, message):
    with pytest.raises(ConfigError, match=message):
        merge("collect", document, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "--dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"max_tokens": "0"}, "--max-tokens: expected an integer of at least 1, got '0'"),
        ({"max_tokens": "1.5"}, "--max-tokens: expected an integer of at least 1, got '1.5'"),
        ({"num_positive": "many"}, "--num-positive: expected an integer of at least 1, got 'many'"),
        ({"threshold": "high"}, "--threshold: expected a number, got 'high'"),
        ({"threshold": "nan"}, "--threshold: expected a (finite )?number, got 'nan'"),
        ({"match_length": "perhaps"}, "--match-length: expected true or false, got 'perhaps'"),
        ({"concepts": []}, "--concepts: expected at least one value"),
        ({"concepts": ["a", "a"]}, "--concepts: expected each value once, got a a"),
        ({"pooling": ["median"]}, "--pooling: expected a list, each one of max, mean, min, last, absmax"),
        ({"model": 3}, "--model: expected a text, got 3"),
        ({"seed": "-1"}, "--seed: expected an integer of at least 0"),
    ],
)
def test_values_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        collect(**settings)


def test_strings_of_the_command_line_become_their_types():
    config = collect(max_tokens="64", match_length="true", threshold="0.5", seed="3", num_positive="10")
    assert (config.max_tokens, config.match_length, config.threshold) == (64, True, 0.5)
    assert (config.seed, config.num_positive) == (3, 10)


def test_one_value_serves_as_a_list():
    assert collect(concepts="toxic", modules="all").modules == ["all"]


def test_required_settings_are_named():
    with pytest.raises(ConfigError, match=r"--concept is required: give the flag, or 'concept' in the config file"):
        resolve(FitConfig, {"store": "s", "out": "o"})


def test_prompts_may_repeat():
    assert resolve(GenerateConfig, {"model": "m", "prompt": ["a", "a"]}).prompt == ["a", "a"]


@pytest.mark.parametrize("value", [-0.1, float("inf")])
def test_strength_is_finite_and_not_negative(value):
    with pytest.raises(ConfigError, match="--strength"):
        resolve(EvaluateConfig, {"model": "m", "perplexity_texts": "t", "out": "o", "strength": value})


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_has_help_and_a_type_in_words(verb):
    config = VERBS[verb].config
    assert VERBS[verb].summary.endswith(".")
    for spec in fields(config):
        assert spec.metadata["help"]
        assert "typing" not in describe(hints(config)[spec.name])
