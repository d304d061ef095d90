"""Settings: types, order of force, strict keys."""

from dataclasses import MISSING, asdict, fields
from types import SimpleNamespace
from typing import Any, get_origin

import pytest

from aura_dist.config.file import merge
from aura_dist.config.settings import OneOf, describe, hints, resolve, shown_name, table_of
from aura_dist.config.verbs import (
    VERBS,
    CollectConfig,
    EvaluateConfig,
    FitConfig,
    GenerateConfig,
    ScoreConfig,
    execution_settings,
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
        ({"collect": ["model"]}, r"section 'collect': expected keys and values, got \['model'\]"),
        ({"collect": {"max-tokens": 3}}, "section 'collect': unknown key 'max-tokens'; did you mean 'max_tokens'"),
        ({"score": {"model": "m"}}, "section 'score': unknown key 'model'"),
        ({"colect": {"model": "m"}}, "unknown key 'colect'; did you mean 'collect'"),
        ({"config": "other.yaml"}, "unknown key 'config'"),
        ({3: 4}, "unknown key '3'"),
        ({"fit": {"concept": "a"}, "zzz": 1}, "unknown key 'zzz'; known keys: "),
    ],
)
def test_unknown_keys_are_errors(document, message):
    with pytest.raises(ConfigError, match=message):
        merge("collect", document, {})


def test_sections_of_other_verbs_are_checked_and_not_taken():
    document = {"score": {"num_workers": 3}, "fit": None, "store": "s"}
    assert merge("score", document, {}) == {"num_workers": 3, "store": "s"}
    assert merge("fit", document, {"store": "flag"}) == {"store": "flag"}


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
        ({"pooling": ["median"]}, "--pooling: expected a list, each one of max, mean, min, last, drawn, absmax"),
        ({"model": 3}, "--model: expected a text, got 3"),
        ({"seed": "-1"}, "--seed: expected an integer of at least 0"),
        ({"seed": 2**63}, "--seed: expected .* of at most 9223372036854775807, got 9223372036854775808"),
        ({"seed": True}, "--seed: expected an integer .*, got True"),
        ({"seed": None}, "--seed: expected an integer .*, got None"),
        ({"num_positive": 2.5}, r"--num-positive: expected an integer of at least 1, got 2\.5"),
        ({"threshold": float("inf")}, "--threshold: expected a finite number, got inf"),
        ({"match_length": 2}, "--match-length: expected true or false, got 2"),
        ({"concepts": None}, "--concepts: expected a list, each a text, got None"),
        ({"concepts": {"a": 1}}, "--concepts: expected a list, each a text, got {'a': 1}"),
        ({"concepts": [1]}, r"--concepts: expected a list, each a text, got \[1\]"),
        ({"modules": []}, "--modules: expected at least one value, got none"),
        ({"modules": ["mlp", "mlp"]}, "--modules: expected each value once, got mlp mlp"),
        ({"pooling": ["max", "mean", "max"]}, "--pooling: expected each value once, got max mean max"),
        ({"dtype": ["float32"]}, "--dtype: expected one of float32"),
        ({"revision": 3}, "--revision: expected a text, got 3"),
        ({"store": ["a"]}, r"--store: expected a text, got \['a'\]"),
    ],
)
def test_values_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        collect(**settings)


def test_strings_of_the_command_line_become_their_types():
    config = collect(max_tokens="64", match_length="true", threshold="0.5", seed="3", num_positive="10")
    assert (config.max_tokens, config.match_length, config.threshold) == (64, True, 0.5)
    assert (config.seed, config.num_positive) == (3, 10)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".5", 0.5),
        ("1.", 1.0),
        ("+.5", 0.5),
        ("-1e-3", -1e-3),
        ("1E2", 100.0),
        ("-.5e+1", -5.0),
        ("3", 3.0),
        (" 1 ", 1.0),
    ],
)
def test_numbers_of_every_spelling(text, number):
    assert collect(threshold=text).threshold == number


@pytest.mark.parametrize("text", [".", "1_0", "e1", "0x1", "1,5", "١", "", "--1", "1e"])
def test_what_is_no_number(text):
    with pytest.raises(ConfigError, match="--threshold: expected a number"):
        collect(threshold=text)


def test_whole_numbers_of_every_spelling():
    assert (collect(seed="+5").seed, collect(seed="007").seed) == (5, 7)
    with pytest.raises(ConfigError, match="--seed: expected an integer"):
        collect(seed="9" * 5000)


@pytest.mark.parametrize("settings", [{"store": "a\0b"}, {"revision": "\0"}, {"concepts": ["a", "b\0"]}])
def test_no_path_holds_nul(settings):
    with pytest.raises(ConfigError, match=r"expected a .*text without a NUL character, got .*x00"):
        collect(**settings)


def test_alpha_is_damps_alone():
    fit = {"store": "s", "concept": "a", "out": "o", "alpha": "0.25"}
    assert resolve(FitConfig, {**fit, "method": "damp"}).alpha == 0.25
    with pytest.raises(ConfigError, match="--alpha: expected it with --method damp alone, got it with aura; leave it"):
        resolve(FitConfig, fit)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("baseline", "toxicity-prompts"), ("prompt_column", "toxicity-prompts"), ("toxic_label", "toxicity-prompts"),
        ("prompt_toxicity_column", "toxicity-prompts"), ("perplexity_labels", "perplexity-texts"),
        ("tasks_path", "tasks"), ("num_fewshot", "tasks"), ("limit", "tasks"),
    ],
)  # fmt: skip
def test_settings_that_nothing_looks_at_are_refused(name, needed):
    parts = {"toxicity_prompts": "p", "perplexity_texts": "t", "tasks": ["a"]}
    settings = {"model": "m", "out": "o", name: 3 if name in ("num_fewshot", "limit") else "a"}
    assert resolve(EvaluateConfig, settings | parts)
    del parts[needed.replace("-", "_")]
    with pytest.raises(ConfigError) as raised:
        resolve(EvaluateConfig, settings | parts)
    own = name.replace("_", "-")
    assert str(raised.value) == f"--{own}: expected it with --{needed}, got it without; leave it out"


def test_temperature_is_checked_by_every_verb_that_samples():
    with pytest.raises(ConfigError, match=r"--temperature: expected 0 or at least 0\.001, got 0\.0001"):
        resolve(EvaluateConfig, {"model": "m", "out": "o", "perplexity_texts": "t", "temperature": 1e-4})


TABLE = {"first": "the first of all", "second": SimpleNamespace(summary="the last")}


def test_values_of_a_table_are_those_that_it_has_now(monkeypatch):
    kind = table_of(hints(ScoreConfig)["statistics"])
    assert not kind.also
    assert {"auroc", "q_value"} <= kind.rows().keys()
    monkeypatch.setattr("aura_dist.scoring.statistics.STATISTICS", TABLE)
    assert kind.rows() == {"first": "the first of all", "second": "the last"}
    assert resolve(ScoreConfig, {"store": "s", "statistics": ["second"]}).statistics == ["second"]
    with pytest.raises(ConfigError, match=r"--statistics: expected a list, each one of first, second, got \['auroc'\]"):
        resolve(ScoreConfig, {"store": "s", "statistics": "auroc"})


def test_a_table_is_a_mapping_or_makes_one():
    assert OneOf(f"{__name__}.table").rows() == {"a": "an a"}


def table():
    return {"a": "an a"}


def test_settings_that_say_how_a_stage_is_run():
    of_sweeps = {"launcher", "jobs", "ranks", "resources", "retries"}
    assert execution_settings() - of_sweeps == {
        "sharding", "offload", "max_memory", "offload_folder", "tensor_plan", "device", "dask", "num_workers",
        "memory_limit", "slurm", "overwrite", "max_attempts", "continuations_per_batch", "host_memory", "wave_tokens",
        "layer_cache", "requests_in_flight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True), ("True", True), ("FALSE", False), ("null", None), ("7", 7), ("-7", -7), ("0.5", 0.5),
        ("[PAD]", "[PAD]"), ("a=b", "a=b"), ("", ""), ("0:10:00", "0:10:00"),
    ],
)  # fmt: skip
def test_values_of_options(word, value):
    found = collect(tokenizer_option=[f"key={word}"]).tokenizer_option["key"]
    assert (found, type(found)) == (value, type(value))


def test_one_value_serves_as_a_list():
    config = collect(concepts="toxic", modules="all", pooling="mean")
    assert (config.concepts, config.modules, config.pooling) == (["toxic"], ["all"], ["mean"])


def test_null_and_an_empty_list_are_the_defaults_where_these_are_empty():
    assert collect(num_positive=None, revision=None, clean_negatives=[]) == collect()


def test_largest_seed_is_taken():
    assert collect(seed=str(2**63 - 1)).seed == 2**63 - 1


FREE = (Any, dict[str, Any])  # checked by the stage that reads them


@pytest.mark.parametrize("verb", VERBS)
def test_a_resolved_config_resolves_to_itself(verb):
    config = VERBS[verb].config
    required = {"model": "m", "data": "d", "concepts": ["a"], "concept": "a", "store": "s", "out": "o", "prompt": ["p"]}
    required |= {"perplexity_texts": "t", "intervention": "i", "run_dirs": ["r"], "run_dir": "r"}
    required |= {"grid": {"method": ["aura"]}, "to": "datasets"}
    resolved = resolve(config, {k: v for k, v in required.items() if k in hints(config)})
    assert resolve(config, merge(verb, {verb: asdict(resolved)}, {})) == resolved


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_refuses_what_is_not_of_its_type(verb):
    """By its flag, with the type in words and the value that came."""
    config = VERBS[verb].config
    for spec in fields(config):
        hint = hints(config)[spec.name]
        if hint in FREE:
            continue
        with pytest.raises(ConfigError) as raised:
            resolve(config, {spec.name: {"wrong": 1}} | required_of(config, spec.name))
        assert str(raised.value) == f"{shown_name(spec)}: expected {describe(hint)}, got {{'wrong': 1}}"


def required_of(config, name):
    """Values for the required settings other than `name`."""
    lists = {n for n, hint in hints(config).items() if get_origin(hint) is list}
    needed = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    tables = {n: next(iter(table.rows())) for n in needed if (table := table_of(hints(config)[n])) and n not in lists}
    return {n: ["a"] if n in lists else tables.get(n, "a") for n in needed if n != name}


@pytest.mark.parametrize("verb", VERBS)
def test_every_required_setting_is_asked_for(verb):
    config = VERBS[verb].config
    for spec in [f for f in fields(config) if f.name in required_of(config, None)]:
        give = f"^{shown_name(spec)} is required: give (it|the flag), or '{spec.name}' in the config"
        if spec.metadata["file_only"]:
            give = f"^'{spec.name}' is required in the config file"
        with pytest.raises(ConfigError, match=give):
            resolve(config, required_of(config, spec.name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0}, "--top-p: expected a number above 0.0 and of at most 1.0, got 0"),
        ({"top_p": "1.01"}, "--top-p: expected a number above 0.0 and of at most 1.0, got '1.01'"),
        ({"top_p": "nan"}, "--top-p: expected .*, got 'nan'"),
        ({"temperature": -1}, "--temperature: expected a number of at least 0.0, got -1"),
        ({"num_samples": 0}, "--num-samples: expected an integer of at least 1, got 0"),
        ({"strength": "nan"}, "--strength: expected .*, got 'nan'"),
    ],
)
def test_bounds_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(GenerateConfig, {"model": "m", "prompt": ["a"], **settings})


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


@pytest.mark.parametrize("verb", ["collect", "fit", "evaluate"])
def test_strength_on_top_of_a_file_that_fits_and_evaluates_would_count_twice(verb):
    document = {"model": "m", "strength": 0.5, "fit": {"method": "aura"}, "evaluate": {"out": "r.json"}}
    with pytest.raises(ConfigError, match="expected 'strength' in one section, got it on top"):
        merge(verb, document, {})
    document["fit"]["strength"] = 1.0
    assert merge("evaluate", document, {})["strength"] == 0.5
    assert merge("fit", document, {})["strength"] == 1.0


def test_strength_on_top_of_a_file_for_one_use_counts():
    assert merge("evaluate", {"model": "m", "strength": 0.5}, {})["strength"] == 0.5
    assert merge("fit", {"store": "s.zarr", "strength": 0.5}, {})["strength"] == 0.5
    assert merge("fit", {"model": "m", "strength": 0.5}, {"strength": 0.2})["strength"] == 0.2
    assert "strength" not in merge("sweep", {"model": "m", "strength": 0.5, "fit": {}, "evaluate": {}}, {})
