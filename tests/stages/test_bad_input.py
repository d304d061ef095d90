"""Everything a user can get wrong: exit code 2, one line that says what was expected and what came."""

import json
import re
import shutil

import numpy as np
import pytest
import zarr

from aura_dist.cli import main
from aura_dist.store.access import SCHEMA_VERSION
from aura_dist.text import tokens
from tests.models import save_tiny, tiny_tokenizer

DATA_FAULTS = {
    "no-such-file.csv": (None, "no such file"),
    "missing-column.csv": ("texts,toxic\nhello,1\nyou,0\n", "expected a column 'text', found texts, toxic"),
    "missing-concept.csv": ("text,toxicity\nhello,1\nyou,0\n", "expected a column 'toxic', found text, toxicity"),
    "empty-text.csv": ("text,toxic\nhello,1\n  ,0\n", "row 1: expected a text in 'text', got an empty one"),
    "number.jsonl": ('{"text": "a", "toxic": 1}\n{"text": 5, "toxic": 0}\n', "row 1: expected a text in 'text', got 5"),
    "one-class.csv": ("text,toxic\na,1\nb,1\n", "concept 'toxic': expected rows of both classes, got 2 positive and 0"),
    "not-binary.csv": ("text,toxic\na,1\nb,0\nc,0.7\n", "row 2: expected 0, 1, true or false in 'toxic', got '0.7'"),
    "bytes.csv": (b"text,toxic\na,1\nb\xff,0\n", "row 1: expected UTF-8, got the byte 0xff"),
    "utf-16.csv": ("text,toxic\na,1\nb,0\n".encode("utf-16"), "the header: expected UTF-8, got the byte 0xff"),
    "null.jsonl": (
        '{"text": "a", "toxic": 1}\n{"text": null, "toxic": 0}\n',
        "row 1: expected a text in 'text', got None",
    ),
    "surrogate.jsonl": ('{"text": "\\ud800", "toxic": 1}\n', "row 0: expected valid Unicode in 'text'"),
    "unlabelled.csv": ("text,toxic\na,\nb,\n", "expected rows of both classes, got 0 positive and 0 negative"),
    "twice.csv": ("text,toxic,text\na,1,b\n", "expected distinct column names, got text, toxic, text"),
    "open-quote.csv": ('text,toxic\na,1\n"b,0\n', "row 1 cannot be parsed: unexpected end of data"),
    "broken.parquet": ("PAR1", "cannot be read"),
    "no-rows.csv": ("text,toxic\n", "expected at least one row, got none"),
    "empty.csv": ("", "expected a header line, got an empty file"),
    "ragged.csv": ("text,toxic\na,1\nb\n", "row 1: expected 2 fields as in the header, got 1"),
    "broken.jsonl": ('{"text": "a", "toxic": 1}\n{"text"\n', "row 1: expected one JSON object a line"),
    "list.jsonl": ("[1]\n", "row 0: expected a JSON object, got list"),
    "table.xlsx": ("", "expected a file ending in"),
}


@pytest.fixture(scope="module")
def scored(tiny_dir, sentences_csv, tmp_path_factory):
    """A scored store of Llama, an intervention beside it."""
    out = tmp_path_factory.mktemp("scored")
    assert main(collect(tiny_dir("llama"), sentences_csv, out / "store.zarr")) == 0
    assert main(["score", "--store", str(out / "store.zarr")]) == 0
    assert main(["fit", "--store", str(out / "store.zarr"), "--concept", "toxic", "--out", str(out / "aura")]) == 0
    return out


def collect(model, data, store, *more):
    """The command, where a flag in `more` takes the place of its own."""
    own = {
        "--model": model, "--data": data, "--concepts": "toxic", "--store": store,
        "--num-positive": 20, "--num-negative": 20,
    }  # fmt: skip
    kept = [str(word) for flag, value in own.items() if flag not in more for word in (flag, value)]
    return ["collect", *kept, *map(str, more)]


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_data_is_checked_before_the_model_is_looked_at(name, refused, tmp_path):
    content, message = DATA_FAULTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(collect("no-such-model", tmp_path / name, tmp_path / "store.zarr"), re.escape(message))
    assert not (tmp_path / "store.zarr").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-positive", 1000], "--num-positive: expected at most 240, the number of positive rows, got 1000"),
        (["--match-length", "--num-negative", 1000], "--num-negative: expected at most 240"),
        (
            ["--modules", "mlp", "*.mpl.*"],
            r"--modules '\*\.mpl\.\*' matches nothing in LlamaForCausalLM; found attention: 12",
        ),
        (["--modules", "*.down_proj*"], "got one that matches both; write .*down_proj:input' for the inputs"),
        (["--modules", "experts"], r"'experts' matches nothing in LlamaForCausalLM; found .*neurons: 3 .*heads: 3"),
        (["--max-tokens", 8, "--model", "no/model"], "--model 'no/model'"),
        (["--sharding", "pipeline"], "--sharding: expected one of replicate, .*got 'pipeline'"),
        (["--device", "tpu"], "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        (["--threshold", "high"], "--threshold: expected a number, got 'high'"),
        (["--pooling", "median"], r"--pooling: expected a list, each one of max, .*, got \['median'\]"),
        (["--text-column", "body"], "expected a column 'body', found text, toxic"),
        (["--num-positive", 0], "--num-positive: expected an integer of at least 1, got '0'"),
        (["--max-tokens", 1], "--max-tokens: expected more than 1, the special tokens that the tokenizer adds"),
        (["--modules", "norms"], "--modules 'norms' matches nothing in LlamaForCausalLM; found attention: 12"),
        (["--modles", "mlp"], "unrecognized arguments: --modles mlp"),
        (["--clean-negatives", "obscene"], "expected a column 'obscene', found text, toxic"),
    ],
)
def test_settings_of_collect(more, message, refused, tiny_dir, sentences_csv, tmp_path):
    refused(collect(tiny_dir("llama"), sentences_csv, tmp_path / "store.zarr", *more), message)


def test_mpt_has_positions_too(refused, tiny_dir, tmp_path):
    data = tmp_path / "long.csv"
    data.write_text(f"text,toxic\n{'word ' * 400},1\nshort,0\n")
    command = ["--data", data, "--concepts", "toxic", "--max-tokens", 400, "--store", tmp_path / "store.zarr"]
    message = "--max-tokens: expected at most 256, the model's positions"
    refused(["collect", "--model", tiny_dir("mpt"), *command], message)
    measure = ["--perplexity-texts", data, "--max-tokens", 400, "--out", tmp_path / "r.json"]
    refused(["evaluate", "--model", tiny_dir("mpt"), *measure], message)
    assert not (tmp_path / "r.json").exists()


def test_tokenizer_of_another_model(refused, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zyx"])
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "d.csv"
    data.write_text("text,toxic\nzyx,1\nshort,0\n")
    message = "--model: expected token ids below 384, the model's vocabulary, got 384 from its tokenizer"
    model = ["--model", tmp_path / "model"]
    refused(["collect", *model, "--data", data, "--concepts", "toxic", "--store", tmp_path / "s.zarr"], message)
    refused(["generate", *model, "--prompt", "zyx"], message)
    refused(["evaluate", *model, "--perplexity-texts", data, "--out", tmp_path / "r.json"], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.csv", "model"]


def test_broken_configuration_is_named_as_such(refused, tiny_dir, sentences_csv, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    command = collect(tmp_path / "model", sentences_csv, tmp_path / "store.zarr")
    refused(command, "expected a local directory or a hub name with a config.json")


def test_prompt_that_is_no_unicode(refused, tiny_dir):
    message = r"--prompt: the model's tokenizer cannot take 'a\\udcff'"
    refused(["generate", "--model", tiny_dir("llama"), "--prompt", "a\udcff"], message)


def test_launch_that_cannot_be(refused, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    command = collect(tiny_dir("llama"), sentences_csv, tmp_path / "store.zarr")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    refused(command, "WORLD_SIZE: expected a number, .* got 'many'")
    monkeypatch.setenv("WORLD_SIZE", "6")
    refused([*command, "--sharding", "fsdp=2,tensor=2"], "fsdp 2 × tensor 2 = 4 ranks a replica to divide the 6")
    refused([*command, "--sharding", "dispatch"], "dispatch: expected one process")


def test_texts_longer_than_the_models_positions(refused, tiny_dir, tmp_path):
    data = tmp_path / "long.csv"
    data.write_text(f"text,toxic\n{'word ' * 400},1\nshort,0\n")
    command = ["--data", data, "--concepts", "toxic", "--max-tokens", 400, "--store", tmp_path / "store.zarr"]
    refused(
        ["collect", "--model", tiny_dir("gpt2"), *command], "--max-tokens: expected at most 256, the model's positions"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storee: a\n", "config file: unknown key 'storee'; did you mean 'store'?"),
        ("collect:\n  max-tokens: 3\n", "section 'collect': unknown key 'max-tokens'; did you mean 'max_tokens'?"),
        ("score:\n  model: m\n", "section 'score': unknown key 'model'"),
        ("seed: high\n", "--seed: expected an integer of at least 0 .*, got 'high'"),
        ("seed: 1\nseed: 2\n", "line 2: expected each key once, got 'seed' again"),
        ("- seed\n", "expected keys and values, got a list"),
        ("seed: [\n", "is not valid YAML"),
    ],
)
def test_config_file(text, message, refused, tiny_dir, sentences_csv, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    refused([*collect(tiny_dir("llama"), sentences_csv, tmp_path / "s.zarr"), "--config", tmp_path / "c.yaml"], message)
    assert not (tmp_path / "s.zarr").exists()


def test_unwritable_store(refused, tiny_dir, sentences_csv, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(collect(tiny_dir("llama"), sentences_csv, tmp_path / "file" / "store.zarr"), "cannot be written")


def test_directory_of_something_else_is_not_touched(refused, tiny_dir, sentences_csv, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    command = collect(tiny_dir("llama"), sentences_csv, tmp_path, "--overwrite")
    refused(command, "expected a store or nothing, found something else")
    refused(command[:-1], "expected a store or nothing, found something else")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-tokens", 7], "another max_tokens: expected 128, got 7"),
        (["--dtype", "bfloat16"], "another dtype: expected float32, got bfloat16"),
        (["--pooling", "max", "mean"], "another poolings"),
        (["--threshold", 0.5], "another data threshold: expected None, got 0.5"),
        (["--clean-negatives", "toxic"], "another data clean_negatives"),
        (["--text-column", "toxic"], "another data text_column: expected text, got toxic"),
        (["--match-length"], "another data sampling match_length: expected False, got True"),
        (["--modules", "attention"], "another sites"),
        (["--seed", 1], "another data sampling seed: expected 0, got 1"),
        (["--num-positive", 19], "another data sampling num_positive: expected 20, got 19"),
        (["--skip-special-tokens"], "another skip_special_tokens: expected False, got True"),
        (["--skip-first-tokens", 1], "another skip_first_tokens: expected 0, got 1"),
        (["--num-negative", 19], "another data sampling num_negative: expected 20, got 19"),
        (["--tokens-per-batch", 64], "another tokens_per_batch: expected 4096, got 64"),
    ],
)
def test_store_begun_under_other_settings(more, message, refused, scored, tiny_dir, sentences_csv):
    refused(collect(tiny_dir("llama"), sentences_csv, scored / "store.zarr", *more), message)
    assert main(["score", "--store", str(scored / "store.zarr")]) == 0, "the store is as good as before"


def test_store_of_other_modules_of_the_same_shape(refused, tiny_dir, sentences_csv, tmp_path):
    command = collect(tiny_dir("llama"), sentences_csv, tmp_path / "store.zarr", "--modules")
    assert main([*command, "*.gate_proj"]) == 0
    refused([*command, "*.up_proj"], r"another sites name: expected .*gate_proj, got .*up_proj")


def test_store_of_other_weights(refused, scored, sentences_csv, tmp_path):
    other = save_tiny("llama", tmp_path / "other", seed=1)
    message = "was collected under another model fingerprint: expected .* got .* or replace this one with --overwrite"
    refused(collect(other, sentences_csv, scored / "store.zarr"), message)


def test_store_of_another_tokenizer(refused, scored, tiny_dir, sentences_csv, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zyx"])
    tokenizer.save_pretrained(tmp_path / "model")
    refused(collect(tmp_path / "model", sentences_csv, scored / "store.zarr"), "another tokenizer sha256")


def test_store_of_texts_cut_at_the_other_end(refused, scored, tiny_dir, sentences_csv, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "truncation_side": "left"}))
    refused(collect(tmp_path / "model", sentences_csv, scored / "store.zarr"), "another tokenizer sha256")


def test_store_of_other_token_ids(refused, scored, tiny_dir, sentences_csv, monkeypatch):
    """Whatever it was that changed them, such as a tokenizer that is Python code."""
    command = collect(tiny_dir("llama"), sentences_csv, scored / "store.zarr")
    assert main(command) == 0
    monkeypatch.setattr("aura_dist.text.tokens._encode", lambda texts, *_: [[3 + len(t) % 7] * 9 for t in texts])
    refused(command, "holds other rows of the data|another data token_ids")
    monkeypatch.undo()
    real = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *a: [[*ids[:-1], (ids[-1] + 1) % 384] for ids in real(*a)])
    refused(command, "another data token_ids: expected .*, got")


def test_store_of_a_model_that_was_moved_is_the_same(scored, tiny_dir, sentences_csv, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    shutil.copy(sentences_csv, tmp_path / "moved.csv")
    assert main(collect(tmp_path / "model", tmp_path / "moved.csv", scored / "store.zarr")) == 0


def test_store_of_another_model(refused, scored, tiny_dir, sentences_csv):
    command = collect(tiny_dir("mistral"), sentences_csv, scored / "store.zarr")
    refused(command, "was collected under another model class: expected LlamaForCausalLM, got MistralForCausalLM")


def test_store_of_other_data(refused, scored, tiny_dir, sentences_csv, tmp_path):
    other = tmp_path / "other.csv"
    shutil.copy(sentences_csv, other)
    with other.open("a") as file:
        file.write("one more,1\n")
    refused(collect(tiny_dir("llama"), other, scored / "store.zarr"), "another data sha256")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score --store {}/nothing.zarr", "expected a store that `collect` wrote, found none"),
        (
            "score --store {}/store.zarr --dask slurmy",
            "--dask: expected one of threads, processes, slurm, tcp://HOST:PORT, got 'slurmy'",
        ),
        ("score --store {}/store.zarr --memory-limit lots", "--memory-limit: expected a size such as 4GB"),
        ("fit --store {}/store.zarr --concept rude --out {}/x", "--concept: expected one of toxic, got 'rude'"),
        (
            "fit --store {}/store.zarr --concept toxic --pooling mean --out {}/x",
            "--pooling: expected one of max, got 'mean'; collect with `--pooling max mean`",
        ),
        (
            "fit --store {}/store.zarr --concept toxic --top-k 99999 --out {}/x",
            "--top-k: expected at most 624, the number of neurons to choose from, got 99999",
        ),
        ("fit --store {}/store.zarr --concept toxic --method magic --out {}/x", "--method: expected one of"),
        ("fit --store {}/store.zarr --concept toxic --out {}/aura/intervention.json/x", "cannot be written"),
        ("fit --store {}/store.zarr --concept toxic --out {}/store.zarr/x", "--out: expected a directory outside"),
        (
            "fit --store {}/store.zarr --concept toxic --alpha 1e300 --out {}/x",
            "--alpha: expected a number of at least",
        ),
    ],
)
def test_settings_of_score_and_fit(arguments, message, refused, scored):
    refused(arguments.replace("{}", str(scored)).split(), re.escape(message))


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_zarr_group_of_something_else_is_not_touched(more, refused, tiny_dir, sentences_csv, tmp_path):
    group = zarr.open_group(tmp_path / "theirs.zarr", mode="w")
    group.create_array("precious", data=np.arange(3))
    command = collect(tiny_dir("llama"), sentences_csv, tmp_path / "theirs.zarr", *more)
    refused(command, "expected a store or nothing, found something else")
    assert zarr.open_group(tmp_path / "theirs.zarr", mode="r")["precious"][...].tolist() == [0, 1, 2]


def test_zarr_array_is_no_store(refused, tiny_dir, sentences_csv, tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=np.arange(3))
    refused(collect(tiny_dir("llama"), sentences_csv, tmp_path / "a.zarr"), "expected a store")
    refused(["score", "--store", tmp_path / "a.zarr"], "expected a store that `collect` wrote")
    assert zarr.open_array(tmp_path / "a.zarr", mode="r")[...].tolist() == [0, 1, 2]


@pytest.mark.parametrize("verb", ["collect", "score", "fit"])
def test_file_is_no_store(verb, refused, tiny_dir, sentences_csv, tmp_path):
    (tmp_path / "notes").write_text("precious")
    command = {
        "collect": collect(tiny_dir("llama"), sentences_csv, tmp_path / "notes"),
        "score": ["score", "--store", tmp_path / "notes"],
        "fit": ["fit", "--store", tmp_path / "notes", "--concept", "toxic", "--out", tmp_path / "x"],
    }
    refused(command[verb], "expected a store")
    assert (tmp_path / "notes").read_text() == "precious"


def test_store_that_is_not_finished(refused, scored, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(scored / "store.zarr", store)
    shutil.rmtree(store / "scores")
    zarr.open_array(store / "progress" / "done", mode="r+")[0] = 0
    refused(["score", "--store", store], r"\d+ of 40 rows are missing; run the same `collect` to finish it")
    refused(["fit", "--store", store, "--concept", "toxic", "--out", tmp_path / "x"], "run `aura-dist score` first")
    assert not (tmp_path / "x").exists()
    for command in (collect(tiny_dir("llama"), sentences_csv, store), ["score", "--store", str(store)]):
        assert main(command) == 0, "what the message says mends it"


def test_store_of_a_later_version(refused, scored, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(scored / "store.zarr", store)
    zarr.open_group(store, mode="r+").attrs["schema_version"] = 99
    for command in (collect(tiny_dir("llama"), sentences_csv, store), ["score", "--store", store]):
        refused(command, f"expected schema version {SCHEMA_VERSION}, got 99")


def test_store_that_is_not_scored(refused, scored, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(scored / "store.zarr", store)
    shutil.rmtree(store / "scores")
    refused(["fit", "--store", store, "--concept", "toxic", "--out", tmp_path / "x"], "run `aura-dist score` first")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["collect", "generate"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "--model .* is not a valid JSON file"),
        ("config.json", "{}", "expected a local directory or a hub name with a config.json"),
        ("config.json", '{"model_type": "nonsense"}', "nonsense"),
        ("config.json", '{"model_type": "t5"}', r"not a causal language model|Unrecognized configuration class"),
        ("tokenizer.json", "[]", "its tokenizer cannot be loaded"),
        ("tokenizer.json", None, "its tokenizer cannot be loaded"),
        ("model.safetensors", None, "expected weights in model.safetensors or pytorch_model.bin, found none"),
        ("model.safetensors", "nonsense", r"model\.safetensors' is damaged"),
    ],
)
def test_broken_models(verb, file, content, message, refused, tiny_dir, sentences_csv, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir("llama"), model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    command = ["generate", "--model", model, "--prompt", "a"]
    refused(collect(model, sentences_csv, tmp_path / "s.zarr") if verb == "collect" else command, message)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "does not fit GPT2LMHeadModel: it has no module 'model.layers.0"),
        ("phi3", "does not fit Phi3ForCausalLM"),
    ],
)
def test_intervention_for_another_architecture(model, message, refused, scored, tiny_dir):
    arguments = ["--intervention", scored / "aura", "--prompt", "Hello"]
    refused(["generate", "--model", tiny_dir(model), *arguments], message)


def test_intervention_for_other_weights(refused, scored, tmp_path):
    other = save_tiny("llama", tmp_path / "other", seed=1)
    arguments = ["--intervention", scored / "aura", "--prompt", "Hello"]
    refused(["generate", "--model", other, *arguments], "was made for .*but --model .* fit one for this model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--prompt", "a", "--intervention", "nowhere"],
            "intervention 'nowhere': expected intervention.json",
        ),
        (["generate"], "--prompt is required"),
        (["generate", "--prompt", "a", "--top-p", "0"], "--top-p: expected a number above 0.0"),
        (["evaluate", "--perplexity-texts", "nowhere.csv", "--out", "x"], "no such file"),
        (["evaluate", "--perplexity-texts", "{}", "--text-column", "body", "--out", "x"], "expected a column 'body'"),
        (["evaluate", "--perplexity-texts", "{}", "--out", "{}/x.json"], "cannot be written"),
        (["generate", "--prompt", "a", "--temperature", "1e-30"], "--temperature: expected 0 or at least 0.001"),
        (
            ["generate", "--prompt", "a", "--max-new-tokens", "999"],
            "--max-new-tokens with the prompt: expected at most 256, the model's positions, got texts of 10",
        ),
    ],
)
def test_settings_of_generate_and_evaluate(arguments, message, refused, tiny_dir, sentences_csv):
    words = [a.replace("{}", sentences_csv) for a in arguments]
    refused([words[0], "--model", tiny_dir("llama"), *words[1:]], re.escape(message))
