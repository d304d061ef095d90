"""Special tokens that a tokenizer adds, each once; chat templates."""

import csv
import logging
from dataclasses import replace

import numpy as np
import pytest
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ConfigError, InputError, ModelError
from aura_dist.interventions.training import stored_tokens
from aura_dist.store.access import open_group, read_array
from aura_dist.store.schema import StoreSpec
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import make_chat
from aura_dist.text.tokens import tokenize
from tests.models import DEMO_SENTENCES, tiny_causal, tiny_tokenizer
from tests.special_tokens import ADDED, CHATML, GEMMA, IDS, LLAMA_3, SILENT, adding, saved, wordpiece

TEXTS = ["the cat sat", "a mat and that old dog far away from home", "the", "run far run away run home and sit"]
KINDS = [*ADDED, "wordpiece"]


def tokenizer_of(kind: str, template: str | dict[str, str] | None = None) -> hf.PreTrainedTokenizerFast:
    tokenizer = wordpiece() if kind == "wordpiece" else adding(kind)
    tokenizer.chat_template = template
    return tokenizer


def ids_of(texts, tokenizer, max_tokens=128, **more):
    made = tokenize(texts, tokenizer, max_tokens=max_tokens, skip_special=False, source="d.csv", **more)
    return [ids.tolist() for ids in made.ids]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_adds(kind):
    added = added_tokens(tokenizer_of(kind))
    before, after = ("[CLS]", "[SEP]") if kind == "wordpiece" else ADDED[kind].replace(" ", "").split("$A")
    assert added.first_text == before
    assert added.last == ((1,) if after else ())
    assert len(added.first) == {"two first": 2, "none": 0, "last": 0}.get(kind, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_the_tokenizer_cuts_them(kind, side):
    tokenizer = tokenizer_of(kind)
    tokenizer.truncation_side = side
    for limit in (3, 4, 7, 9, 128):
        assert ids_of(TEXTS, tokenizer, limit) == tokenizer(TEXTS, truncation=True, max_length=limit)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_begins_with_the_first_token_gets_no_second_one(kind, side, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = tokenizer_of(kind)
    tokenizer.truncation_side = side
    first = added_tokens(tokenizer).first_text
    begun = [first + text if row % 2 else text for row, text in enumerate(TEXTS)]
    for limit in (3, 5, 9, 128):
        assert ids_of(begun, tokenizer, limit) == ids_of(TEXTS, tokenizer, limit), limit
    said = [r.getMessage() for r in caplog.records]
    assert (f"2 of 4 texts begin with {first}: no second one is added" in said) == bool(first)
    more = ids_of([first * 2 + "the"], tokenizer)[0]
    assert more == [*added_tokens(tokenizer).first, *ids_of(["the"], tokenizer)[0]], "what a text holds beyond it stays"


def test_last_tokens_are_left_out_where_a_text_goes_on():
    tokenizer = adding("both")
    whole = [[IDS["<bos>"], *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    for limit in (4, 6, 128):
        assert ids_of(TEXTS, tokenizer, limit, ended=False) == [ids[:limit] for ids in whole]
    assert ids_of(["the<eos>"], tokenizer, ended=False)[0][-1] == IDS["<eos>"], "the text's own one stays"


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("template", [LLAMA_3, GEMMA, CHATML], ids=["llama", "gemma", "chatml"])
def test_chats_have_the_ids_of_the_template_and_one_first_token(template, role, system):
    tokenizer = tokenizer_of("both", template)
    if template == GEMMA and (role, system) != ("user", None):
        with pytest.raises((ModelError, ConfigError), match=r"chat template refuses .*(alternate|not supported)"):
            make_chat(tokenizer, role, system)
        return
    turns = [{"role": "system", "content": system}] * (system is not None)
    whole = [
        tokenizer.apply_chat_template([*turns, {"role": role, "content": text}], return_dict=False) for text in TEXTS
    ]
    expected = [ids if ids[0] == IDS["<bos>"] else [IDS["<bos>"], *ids] for ids in whole]
    chat = make_chat(tokenizer, role, system)
    assert ids_of(TEXTS, tokenizer, chat=chat) == expected
    assert ids_of(["<bos>" + text for text in TEXTS], tokenizer, chat=chat) == expected
    assert all(ids.count(IDS["<bos>"]) == 1 and ids.count(IDS["<eos>"]) == 0 for ids in expected)


def test_chats_that_lose_their_end_are_counted(caplog):
    caplog.set_level(logging.INFO)
    tokenizer = tokenizer_of("first", LLAMA_3)
    lengths = [len(ids) for ids in ids_of(TEXTS, tokenizer, chat=make_chat(tokenizer, "user"))]
    assert not caplog.records
    limit = sorted(lengths)[1]
    kept = ids_of(TEXTS, tokenizer, limit, chat=make_chat(tokenizer, "user"))
    assert [len(ids) for ids in kept] == [min(n, limit) for n in lengths]
    assert f"2 of 4 chats are cut at {limit} tokens" in caplog.text


@pytest.mark.parametrize(
    ("template", "role", "system", "message"),
    [
        (None, "user", None, "expected a tokenizer with a chat template, got one without"),
        ({"rag": CHATML, "tool_use": CHATML}, "user", None, "named 'default', got rag, tool_use"),
        ("{% for m in messages %}", "user", None, "--chat: the model's chat template refuses .*end of template"),
        ("{{ messages[0]['content'][0]['text'] }}", "user", None, "leaves out a text of the user|refuses"),
        (GEMMA, "assistant", None, "refuses a conversation of one turn of the assistant: .*must alternate"),
        (SILENT, "assistant", None, "leaves out a text of the assistant"),
        (GEMMA, "user", "Be kind.", "--system: .* refuses a system's turn: .*not supported; leave --system out"),
        (SILENT, "user", "Be kind.", "--system: .* leaves out a system's text"),
    ],
)
def test_templates_that_cannot_do_what_is_asked(template, role, system, message):
    with pytest.raises((ModelError, ConfigError), match=message):
        make_chat(tokenizer_of("first", template), role, system)


def test_a_system_text_that_begins_with_the_first_token_gets_no_second_one():
    tokenizer = tokenizer_of("first", CHATML)
    expected = ids_of(TEXTS, tokenizer, chat=make_chat(tokenizer, "user", "Be kind."))
    assert ids_of(TEXTS, tokenizer, chat=make_chat(tokenizer, "user", "<bos>Be kind.")) == expected


def test_a_tokenizer_that_would_split_the_templates_tokens_is_refused():
    tokenizer = tokenizer_of("first", CHATML)
    tokenizer.split_special_tokens = True
    with pytest.raises(ConfigError, match="--tokenizer-option split_special_tokens=false"):
        make_chat(tokenizer, "user")


def test_a_text_that_the_template_refuses_is_named():
    refusing = "{% if 'old' in messages[0]['content'] %}{{ raise_exception('too old') }}{% endif %}" + CHATML
    tokenizer = tokenizer_of("first", refusing)
    with pytest.raises(InputError, match=r"data 'd.csv': row 1: the model's chat template cannot take it: too old"):
        ids_of(TEXTS, tokenizer, chat=make_chat(tokenizer, "user"))


def test_identity_of_a_chat():
    tokenizer = tokenizer_of("first", {"default": LLAMA_3, "other": CHATML})
    chat = make_chat(tokenizer, "user")
    others = [make_chat(tokenizer, "assistant"), make_chat(tokenizer, "user", "Hi."), replace(chat, template=CHATML)]
    assert len({str(c.identity) for c in (chat, *others)}) == 4
    assert chat.identity == make_chat(tokenizer_of("none", LLAMA_3), "user").identity


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA_3
    return saved(tiny_causal("llama"), tokenizer, tmp_path_factory.mktemp("chat"))


def collected(model, data, store, *more):
    flags = ["--model", model, "--data", str(data), "--concepts", "toxic", "--modules", "*.1.mlp.up_proj"]
    return ["collect", *flags, "--pooling", "last", "max", "--store", str(store), *more]


def test_stores_of_chats(chat_model, tmp_path, refused, caplog):
    """Equal to the store of the texts rendered before, and never taken for another chat's."""
    tokenizer = hf.AutoTokenizer.from_pretrained(chat_model)
    with DEMO_SENTENCES.open() as file:
        rows = [(row["text"], row["toxic"]) for row in csv.DictReader(file)][::8]
    turns = ({"role": "system", "content": "Be kind."},)
    data = {
        "a.csv": rows,
        "b.csv": [
            (tokenizer.apply_chat_template([*turns, {"role": "user", "content": x}], tokenize=False), y)
            for x, y in rows
        ],
    }
    for name, content in data.items():
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "toxic"), *content])
    how = ["--chat", "user", "--system", "Be kind."]
    chats = collected(chat_model, tmp_path / "a.csv", tmp_path / "a.zarr")
    assert main([*chats, *how]) == 0
    assert main(collected(chat_model, tmp_path / "b.csv", tmp_path / "b.zarr")) == 0
    trees = [aura_dist.open_store(str(tmp_path / name)) for name in ("a.zarr", "b.zarr")]
    for pooling in ("last", "max"):
        left, right = (np.asarray(tree["activations"]["model.layers.1.mlp.up_proj"][pooling]) for tree in trees)
        np.testing.assert_array_equal(left, right)
    stored = open_group(str(tmp_path / "a.zarr")).attrs["tokenizer"]["chat"]
    assert stored == make_chat(tokenizer, "user", "Be kind.").identity
    group = open_group(str(tmp_path / "a.zarr"))
    spec, rows = StoreSpec.of(group), read_array(group, "samples/row")
    assert stored_tokens(group, spec, rows, tokenizer).digest() == spec.data["token_ids"], (
        "for methods that are trained"
    )
    assert main([*chats, *how]) == 0
    refused(chats, "another tokenizer chat: expected .*user.*, got None")
    refused([*chats, "--chat", "assistant", "--system", "Be kind."], "another tokenizer chat role: expected user")
    refused([*chats, "--chat", "user", "--system", "Be rude."], "another tokenizer chat system: expected Be kind")
    refused([*chats, "--system", "Be kind."], "--system: expected it with --chat, got it without")
    refused([*chats, "--chat", "tool"], "--chat: expected one of user, assistant, got 'tool'")
    plan = [flag for flag in [*chats, *how] if flag not in ("collect", "--store", str(tmp_path / "a.zarr"))]
    assert main(["plan", *plan, "--json"]) == 0


def test_chats_from_python(chat_model, tmp_path):
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(chat_model), tokenizer_of("first", CHATML)
    labels = [0, 1, 0, 1]
    options = {"tokenizer": tokenizer, "modules": ["*.0.mlp.up_proj"]}
    aura_dist.collect(model, TEXTS, labels, store=tmp_path / "s", chat="assistant", system="Hi.", **options)
    assert open_group(str(tmp_path / "s")).attrs["tokenizer"]["chat"]["role"] == "assistant"
    with pytest.raises(ConfigError, match="system: expected it with chat, got it without"):
        aura_dist.collect(model, TEXTS, labels, store=tmp_path / "t", system="Hi.", **options)
