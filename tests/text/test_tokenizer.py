"""The tokenizer that is loaded is the one that the checkpoint means, and its digest is of what it does."""

import json
import logging
import shutil
from importlib.util import find_spec

import pytest
import transformers as hf
import zarr
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from aura_dist.cli import main
from aura_dist.errors import ConfigError, ModelError
from aura_dist.store.access import open_group
from aura_dist.text.tokenizer import (
    PROBES,
    TokenizerSettings,
    check_has_vocabulary,
    difference_from_file,
    load_tokenizer,
    special_ids,
    tokenizer_digest,
)
from tests.models import save_tiny, tiny_tokenizer
from tests.tokenizers import FAMILIES, edit, save_family

HAS_SENTENCEPIECE = all(map(find_spec, ("sentencepiece", "google"))) and find_spec("google.protobuf")
# what a `.model` file takes to read, by family
PACKAGES = {"llama": "sentencepiece and protobuf", "gemma": "sentencepiece and protobuf"}
PACKAGES |= {"t5": "sentencepiece and protobuf", "tiktoken": "tiktoken"}
DIGITS = {"type": "Digits", "individual_digits": True}


def ids(tokenizer, text="The cat 12345"):
    return tokenizer(text)["input_ids"]


def of_file(directory, text):
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_json_alone_is_enough(name, tmp_path):
    directory = save_family(name, tmp_path / "model")
    tokenizer = load_tokenizer(str(directory))
    assert ids(tokenizer) == of_file(directory, "The cat 12345")
    assert ids(tokenizer, "the cat") != ids(tokenizer, "the fool")


@pytest.mark.parametrize("name", FAMILIES)
def test_slow_files_are_read_or_the_package_for_them_is_named(name, tmp_path):
    directory = str(save_family(name, tmp_path / "model", "slow"))
    there = name not in PACKAGES or (find_spec("tiktoken") if name == "tiktoken" else HAS_SENTENCEPIECE)
    if there:
        assert ids(load_tokenizer(directory), "the cat") != ids(load_tokenizer(directory), "the fool")
        return
    with pytest.raises(ModelError, match=rf"cannot be loaded: \w+.model takes {PACKAGES[name]} to read: pip install"):
        load_tokenizer(directory)


@pytest.mark.parametrize("keep", ["config", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_without_a_vocabulary_names_the_missing_file(name, keep, tmp_path):
    directory = save_family(name, tmp_path / "model", keep)
    with pytest.raises(
        ModelError, match=r"its tokenizer (cannot be loaded: expected|has no vocabulary: .*did not find)"
    ) as e:
        load_tokenizer(str(directory))
    assert "tokenizer.json" in str(e.value)
    assert "\n" not in str(e.value)
    assert FAMILIES[name][2][0] in str(e.value) or name in ("llama", "gemma", "tiktoken")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_of_two_files_is_named(missing, tmp_path):
    directory = save_family("gpt2", tmp_path / "model", "slow")
    (directory / missing).unlink()
    with pytest.raises(ModelError, match=r"expected tokenizer.json, or vocab.json and merges.txt, found \S+ alone"):
        load_tokenizer(str(directory))


def test_empty_file_of_merges_is_named(tmp_path):
    directory = save_family("gpt2", tmp_path / "model", "slow")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match=r"its tokenizer has no merges: merges.txt is missing or empty"):
        load_tokenizer(str(directory))


def word_level(words):
    from tokenizers import models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["the", "cat"], "has no vocabulary: 2 entries"),
        (
            [f"<{i}>" for i in range(50)],
            r"maps 'the cat went up' and 'you old fool go' to the same ids, \[0, 0, 0, 0\]",
        ),
        (["the", "cat", "sat", "on", "a", "mat", "and", "you", "old", "dog", "ran"], None),
        (["GATTACA", *"abcdefgh"], None),
    ],
    ids=["a handful", "none of the words", "a small one", "of another alphabet"],
)
def test_vocabulary_of_words(words, fault, tmp_path):
    word_level(words).save_pretrained(tmp_path)
    if fault is None:
        assert load_tokenizer(str(tmp_path)).get_vocab()[words[0]] == 1
        return
    with pytest.raises(ModelError, match=fault):
        load_tokenizer(str(tmp_path))


def test_tokenizers_of_other_loaders_are_checked_too(tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(save_family("gpt2", tmp_path / "model", "none"))
    with pytest.raises(ModelError, match="--scorer 'x': its tokenizer has no vocabulary: 0 entries"):
        check_has_vocabulary(tokenizer, "--scorer 'x'")
    check_has_vocabulary(tiny_tokenizer(), "--scorer 'x'")


def test_another_loader_can_say_that_ids_are_not_those_of_the_file(tmp_path):
    """`evaluate --scorer` warns of it."""
    for change, said in ((None, ""), (normalizer, "'The cat sat on the mat.' on, the file has")):
        directory = save_family("llama", tmp_path / f"model{said[:4]}")
        if change:
            change(directory)
        tokenizer = hf.AutoTokenizer.from_pretrained(directory)
        found = difference_from_file(tokenizer, str(directory), "--scorer 'x'")
        assert said in found
        assert bool(found) == bool(said)


def digits(directory):
    """GPT-2's class rebuilds the pre-tokenizer, and so joins digits again."""
    document = json.loads((directory / "tokenizer.json").read_text())
    return edit(directory, pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, document["pre_tokenizer"]]})


def normalizer(directory):
    """Llama's class has no normalizer."""
    return edit(directory, normalizer={"type": "Lowercase"})


def case(directory):
    """BERT's class takes the case from the configuration."""
    return edit(directory, "tokenizer_config.json", do_lower_case=False)


def first_token(directory):
    """GPT-NeoX's class replaces the post-processor."""
    edit(directory, "tokenizer_config.json", tokenizer_class="GPTNeoXTokenizer", bos_token="<|endoftext|>")
    hf.GPTNeoXConfig().save_pretrained(directory)
    post = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = post
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def added(directory):
    """The configuration says something else of an added token."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|turn|>", rstrip=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    index = str(tokenizer.token_to_id("<|turn|>"))
    flags = {"content": "<|turn|>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    return edit(directory, "tokenizer_config.json", added_tokens_decoder={index: {**flags, "special": True}})


@pytest.mark.parametrize(
    ("name", "change", "text", "shown"),
    [
        ("gpt2", digits, "12345", "0 1 23 456"),
        ("llama", normalizer, "THE CAT", "The cat sat"),
        ("bert", case, "THE CAT", "The cat sat"),
        ("gpt2", first_token, "the cat", "from token 0 of"),
        ("tiktoken", added, "a <|turn|> b", r"<\|turn\|>"),
    ],
)
def test_ids_that_are_not_those_of_the_file_are_refused(name, change, text, shown, tmp_path):
    directory = change(save_family(name, tmp_path / "model"))
    with pytest.raises(ModelError, match=f"{shown}.* --tokenizer-ids file or --tokenizer-ids loaded$") as error:
        load_tokenizer(str(directory))
    assert "\n" not in str(error.value)
    file, loaded = (load_tokenizer(str(directory), None, TokenizerSettings(ids)) for ids in ("file", "loaded"))
    assert ids(file, text) == of_file(directory, text)
    assert ids(loaded, text) == ids(hf.AutoTokenizer.from_pretrained(directory), text) != ids(file, text)
    assert tokenizer_digest(file) != tokenizer_digest(loaded)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_of_the_file_are_the_loaded_ones_where_nothing_is_wrong(name, tmp_path):
    directory = str(save_family(name, tmp_path / "model"))
    file, loaded = (load_tokenizer(directory, None, TokenizerSettings(ids)) for ids in ("file", "loaded"))
    assert [ids(file, text) for text in PROBES] == [ids(loaded, text) for text in PROBES]


def test_ids_of_a_file_that_is_not_there(tmp_path):
    directory = save_family("gpt2", tmp_path / "model", "slow")
    with pytest.raises(
        ModelError, match=r"--tokenizer-ids file: expected --model .* to have a tokenizer.json, found none"
    ):
        load_tokenizer(str(directory), None, TokenizerSettings("file"))


def with_options(directory, **options):
    return load_tokenizer(str(directory), None, TokenizerSettings(None, options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"add_prefix_space": True}),
        ("llama", {"legacy": True, "add_prefix_space": True}),
        ("llama", {"add_prefix_space": False}),
        ("bert", {"do_lower_case": False}),
        ("tiktoken", {"add_bos_token": True}),
        ("gpt2", {"truncation_side": "left"}),
        ("gpt2", {"pad_token": "<|endoftext|>"}),
    ],
)
def test_options_reach_the_tokenizer_and_its_digest(name, options, tmp_path, caplog):
    directory = save_family(name, tmp_path / "model")
    caplog.set_level(logging.INFO)
    plain, changed = load_tokenizer(str(directory)), with_options(directory, **options)
    assert tokenizer_digest(changed) != tokenizer_digest(plain)
    assert ids(changed) == ids(hf.AutoTokenizer.from_pretrained(directory, **options))
    if ids(changed) != ids(plain):
        assert "without it [" in caplog.text


def test_option_that_takes_away_the_first_token_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny_tokenizer().save_pretrained(tmp_path)
    with_options(tmp_path, add_eos_token=True)
    assert "--tokenizer-option add_eos_token=True: from token 0 of" in caplog.text


def test_option_does_not_hide_a_difference_of_another_cause(tmp_path):
    directory = digits(save_family("gpt2", tmp_path / "model"))
    with pytest.raises(ModelError, match="choose with --tokenizer-ids"):
        with_options(directory, truncation_side="left")


def test_option_without_effect_is_said(tmp_path, caplog):
    directory = save_family("gpt2", tmp_path / "model")
    for option in ({"fix_mistral_regex": True}, {"use_fast": False}, {"padding_side": "left"}):
        with_options(directory, **option)
    assert caplog.text.count("changes nothing in this tokenizer") == 3


def test_option_that_nothing_knows_is_refused(tmp_path):
    directory = save_family("gpt2", tmp_path / "model")
    with pytest.raises(ConfigError, match="GPT2Tokenizer knows no option 'add_prefix_spaces'"):
        with_options(directory, add_prefix_spaces=True)
    with pytest.raises(ConfigError, match=r"--tokenizer-ids file takes tokenizer.json as it is"):
        TokenizerSettings("file", {"add_prefix_space": True})


@pytest.mark.parametrize("name", ["trust_remote_code", "revision", "token", "vocab_file", "subfolder"])
def test_option_that_says_what_is_loaded_is_refused(name):
    with pytest.raises(ConfigError, match=f"expected how the tokenizer acts, got '{name}'"):
        TokenizerSettings(None, {name: True})


def test_mistral_fix_changes_ids(tmp_path):
    """transformers looks at it where the vocabulary is as large as Mistral's and an earlier version saved the model."""
    directory = save_family("gpt2", tmp_path / "model")
    document = json.loads((directory / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {f"filler{i}": 1000 + i for i in range(100_001)}
    edit(directory, model=document["model"])
    hf.MistralConfig().save_pretrained(directory)
    edit(directory, "config.json", transformers_version="4.57.2")
    edit(directory, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert ids(with_options(directory, fix_mistral_regex=True)) != of_file(directory, "The cat 12345")


def test_configuration_that_is_not_followed_is_said(tmp_path, caplog):
    """An earlier transformers added no first token here."""
    tiny_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    assert not caplog.text
    edit(tmp_path, "tokenizer_config.json", add_bos_token=False)
    load_tokenizer(str(tmp_path))
    flags = "--tokenizer-option add_bos_token=false add_eos_token=false"
    assert f"tokenizer_config.json is not followed; to follow it: {flags}" in caplog.text
    caplog.clear()
    with_options(tmp_path, add_bos_token=False, add_eos_token=False)
    assert "is not followed" not in caplog.text


@pytest.mark.parametrize("name", FAMILIES)
def test_digest_is_not_of_names_and_files(name, tmp_path):
    directory = save_family(name, tmp_path / "one")
    tokenizer = load_tokenizer(str(directory))
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(directory / "config.json", tmp_path / "saved")
    moved = shutil.copytree(directory, tmp_path / "moved")
    (moved / "README.md").write_text("Another name.")
    document = json.loads((moved / "tokenizer.json").read_text())
    (moved / "tokenizer.json").write_text(json.dumps(document, indent=7, sort_keys=True))
    digests = {tokenizer_digest(load_tokenizer(str(d))) for d in (directory, tmp_path / "saved", moved)}
    assert digests == {tokenizer_digest(tokenizer)}


def test_digest_does_not_depend_on_the_files_that_made_it(tmp_path):
    json_only, slow = (save_family("gpt2", tmp_path / keep, keep) for keep in ("json", "slow"))
    assert tokenizer_digest(load_tokenizer(str(json_only))) == tokenizer_digest(load_tokenizer(str(slow)))


def test_digest_sees_each_part():
    def changed(change):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    def backend(**parts):
        def change(tokenizer):
            document = json.loads(tokenizer.backend_tokenizer.to_str())
            document["model"] |= parts.pop("model", {})
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**document, **parts}))

        return change

    merges = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    changes = [
        lambda t: None,
        backend(normalizer={"type": "NFC"}),
        backend(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        backend(post_processor=None),
        backend(decoder={"type": "Fuse"}),
        backend(model={"merges": [merges[1], merges[0], *merges[2:]]}),
        backend(model={"ignore_merges": True}),
        lambda t: setattr(t, "chat_template", "{{ messages[0].content }}"),
        lambda t: setattr(t, "bos_token", "<eos>"),
        lambda t: setattr(t, "split_special_tokens", True),
        lambda t: t.add_tokens([AddedToken("cat", special=False)]),
        lambda t: t.add_tokens([AddedToken("cat", special=True)]),
        lambda t: t.add_tokens([AddedToken("cat", rstrip=True)]),
    ]
    assert len({changed(change) for change in changes}) == len(changes)


def test_digest_of_python_tokenizers_sees_merges(tmp_path):
    """CTRL's tokenizer is Python code: its vocabulary does not tell which merges it has."""

    def ctrl(name, *merges):
        (tmp_path / name).mkdir()
        vocabulary = ["<unk>", *"theca", *(f"{c}@@" for c in "theca"), "th@@", "he", "the", "ca@@"]
        (tmp_path / name / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
        (tmp_path / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return hf.CTRLTokenizer(str(tmp_path / name / "vocab.json"), str(tmp_path / name / "merges.txt"))

    first, same, other = ctrl("a", "t h", "th e</w>"), ctrl("b", "t h", "th e</w>"), ctrl("c", "h e</w>", "t he</w>")
    assert tokenizer_digest(first) == tokenizer_digest(same) != tokenizer_digest(other)


@pytest.mark.parametrize("name", FAMILIES)
def test_special_ids_are_those_that_decoding_drops(name, tmp_path):
    tokenizer = load_tokenizer(str(save_family(name, tmp_path / "model")))
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<plain>", special=False)])
    dropped = [
        i
        for i in tokenizer.get_vocab().values()
        if tokenizer.decode([i]) and not tokenizer.decode([i], skip_special_tokens=True)
    ]
    assert special_ids(tokenizer) == sorted(dropped)
    assert tokenizer.convert_tokens_to_ids("<|turn|>") in dropped


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """A model whose tokenizer transformers rebuilds in another way than its file says."""
    directory = save_tiny("gpt2", tmp_path_factory.mktemp("rebuilt"))
    for file in directory.glob("tokenizer*"):
        file.unlink()
    hf.GPT2Tokenizer.from_pretrained(save_family("gpt2", directory / "other")).save_pretrained(directory)
    shutil.rmtree(directory / "other")
    return digits(directory)


def test_every_verb_refuses_and_takes_the_flags(rebuilt, tmp_path, refused, capsys):
    data = tmp_path / "data.csv"
    data.write_text("text,toxic\n" + "".join(f"12345 you are {'fool' * (i % 2)} {i},{i % 2}\n" for i in range(8)))
    store, model = tmp_path / "store.zarr", ["--model", str(rebuilt)]
    texts = [*model, "--data", str(data), "--concepts", "toxic"]
    verbs = {
        "plan": texts,
        "collect": [*texts, "--store", str(store), "--modules", "*.0.mlp.c_fc"],
        "generate": [*model, "--prompt", "12345 678", "--max-new-tokens", "1"],
        "evaluate": [*model, "--perplexity-texts", str(data), "--out", str(tmp_path / "out.json")],
    }
    for verb, flags in verbs.items():
        refused([verb, *flags], "choose with --tokenizer-ids file or --tokenizer-ids loaded")
        refused([verb, *flags, "--tokenizer-option", "nonsense"], "expected KEY=VALUE")
        assert main([verb, *flags, "--tokenizer-ids", "file"]) == 0, capsys.readouterr().err
    lengths = zarr.open_array(store / "samples" / "num_tokens", mode="r")[:].tolist()
    rows = [line.rpartition(",")[0] for line in data.read_text().splitlines()[1:]]
    assert sorted(lengths) == sorted(len(of_file(rebuilt, text)) for text in rows)
    refused(["collect", *verbs["collect"], "--tokenizer-ids", "loaded"], "another tokenizer sha256")


def test_store_of_an_earlier_rule_is_taken_with_a_note(collected_by_earlier_rule, capsys):
    command, store = collected_by_earlier_rule
    assert main(command) == 0
    assert "the token ids of all texts are compared, not the digest" in capsys.readouterr().err
    assert "rule" not in open_group(str(store)).attrs["tokenizer"]


@pytest.fixture
def collected_by_earlier_rule(tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    command = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    command += ["--num-positive", "4", "--num-negative", "4", "--modules", "*.0.mlp.up_proj", "--store", str(store)]
    assert main(command) == 0
    group = open_group(str(store))
    group.attrs["tokenizer"] = {"name": "somewhere", "sha256": "of an earlier rule"}
    return command, store
