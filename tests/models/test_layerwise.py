"""A model that runs layer by layer gives the bits of an ordinary forward, or is refused by name."""

import json
import mmap
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aura_dist.errors import ConfigError, ModelError
from aura_dist.evaluation.harness import make_harness
from aura_dist.evaluation.perplexity import negative_log_likelihoods
from aura_dist.models import layer_reader
from aura_dist.models.layerwise import executor_of
from aura_dist.models.load import ModelSource, load_base, load_causal
from aura_dist.models.strategies.table import parse_sharding
from aura_dist.ranks.world import World
from aura_dist.text.tokens import TokenizedTexts
from tests.layerwise import LAYERS, batches, by_layer
from tests.models import HYBRID_CONFIGS, LLAMA_LIKE, ODD_CONFIGS, TINY_CONFIGS, VOCAB, tiny_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*TINY_CONFIGS, *ODD_CONFIGS, *HYBRID_CONFIGS])
def test_outputs_have_the_bits_of_an_ordinary_forward(name, dtype, tiny_dir):
    source = ModelSource(str(tiny_dir(name)), None, dtype)
    plain, ours = load_base(source, World()), load_base(source, LAYERS)
    assert type(ours) is type(plain)
    with torch.no_grad():
        expected = [plain(**given, use_cache=False)[0] for given in batches()]
    for _ in range(2):  # weights that were dropped come back
        for found, wanted in zip(by_layer(ours, batches()), expected, strict=True):
            assert torch.equal(found, wanted)
    assert all(p.is_meta for p in executor_of(ours)._layers.parameters())


@pytest.mark.parametrize(("name", "loaded"), [("llama", [0]), ("jamba", [0, 1])])
def test_the_check_loads_one_layer_where_the_second_is_alike(name, loaded, tiny_dir):
    executor = executor_of(load_base(ModelSource(str(tiny_dir(name)), None, "float32"), LAYERS))
    executor.prepare(batches()[0])
    held = [i for i, layer in enumerate(executor._layers) if not any(p.is_meta for p in layer.parameters())]
    assert held == loaded


def save_random(config, directory):
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return ModelSource(str(directory), None, "float32")


def test_layers_that_share_keys_and_values_are_refused_by_name(tmp_path):
    config = hf.Gemma3nTextConfig(
        **{**LLAMA_LIKE, "num_hidden_layers": 4}, head_dim=12, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=32,
        activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, laurel_rank=4,
    )  # fmt: skip
    model = load_base(save_random(config, tmp_path), LAYERS)
    with pytest.raises(
        ModelError, match=r"Gemma3nTextModel cannot run layer by layer, because .*use --sharding dispatch"
    ):
        by_layer(model, batches())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda hidden, index: hidden * (1 + index), "changes the hidden states between its layers"),
        (
            lambda hidden, index: hidden if index != 2 else hidden.clone(),
            "changes the hidden states between its layers",
        ),
    ],
)
def test_a_model_that_computes_between_its_layers_is_refused(change, why, tiny_dir, monkeypatch):
    model = load_base(ModelSource(str(tiny_dir("gpt2")), None, "float32"), LAYERS)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.wte(input_ids)
        for index, block in enumerate(self.h):
            hidden = block(change(hidden, index))
        return (self.ln_f(hidden),)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match=why):
        by_layer(model, batches())


def test_layers_that_pass_a_second_tensor_on(tiny_dir, monkeypatch):
    """It goes along, as do the embeddings where every layer takes them."""
    source = ModelSource(str(tiny_dir("gpt2")), None, "float32")
    plain, ours = load_base(source, World()), load_base(source, LAYERS)
    block = type(plain.h[0])
    run = block.forward

    def layer(self, hidden, carried, embedded):
        hidden = run(self, hidden) + 0.1 * carried + 0.01 * embedded
        return hidden, carried + hidden

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        embedded = hidden = self.wte(input_ids)
        carried = torch.zeros_like(hidden)
        for each in self.h:
            hidden, carried = each(hidden, carried, embedded)
        return (self.ln_f(hidden),)

    monkeypatch.setattr(block, "forward", layer)
    monkeypatch.setattr(type(plain), "forward", forward)
    for found, given in zip(by_layer(ours, batches()), batches(), strict=True):
        with torch.no_grad():
            assert torch.equal(found, plain(**given)[0])


def test_layers_that_speak_through_their_modules_fail_the_check(tiny_dir, monkeypatch):
    """Nothing in the calls shows that the second layer takes a number of the first."""
    model = load_base(ModelSource(str(tiny_dir("llama")), None, "float32"), LAYERS)
    layer, seen = type(model.layers[0]), []
    run = layer.forward

    def forward(self, hidden_states, **kwargs):
        seen.append(len(seen))
        return run(self, hidden_states, **kwargs) + len(seen)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(ModelError, match="other values when they are called one by one"):
        by_layer(model, batches())


def texts(num=12):
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, VOCAB, size).astype(np.int32) for size in rng.integers(2, 30, num)]
    return TokenizedTexts(ids, np.array([0]), skip_special=False)


@pytest.mark.parametrize("name", ["llama", "opt", "falcon-rotary", "bamba"])
def test_perplexity_has_the_bits_of_an_ordinary_forward(name, tiny_dir):
    source = ModelSource(str(tiny_dir(name)), None, "float32")
    expected, counts = negative_log_likelihoods(load_causal(source, World()), texts(), 64)
    ours = load_causal(source, LAYERS, {"wave_tokens": 150})
    found, numbers = negative_log_likelihoods(ours, texts(), 64)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(numbers, counts)


def test_likelihoods_of_answers_are_those_of_an_ordinary_forward(tiny_dir):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    source, tokenizer = ModelSource(str(tiny_dir("llama")), None, "float32"), tiny_tokenizer()
    rng = np.random.default_rng(0)
    requests = [
        (("", ""), rng.integers(3, VOCAB, size).tolist(), rng.integers(3, VOCAB, 3).tolist())
        for size in rng.integers(2, 20, 20)
    ]
    plain, ours = (make_harness(load_causal(source, w), tokenizer, None, None) for w in (World(), LAYERS))
    assert ours._loglikelihood_tokens(requests) == plain._loglikelihood_tokens(requests)
    with pytest.raises(ConfigError, match="expected tasks that compare likelihoods"):
        ours.generate_until([])


def test_layers_that_share_weights_are_refused(tiny_dir, monkeypatch):
    tied = "aura_dist.sites.transformers_adapter.tied_parameters"
    monkeypatch.setattr(tied, lambda model: ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"])
    with pytest.raises(ModelError, match=r"LlamaModel cannot run layer by layer, because its layers share weights"):
        load_base(ModelSource(str(tiny_dir("llama")), None, "float32"), LAYERS)


def test_quantised_weights_are_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected weights that are not quantised with --sharding layers"):
        load_base(ModelSource(str(tmp_path / "model"), None, "float32"), LAYERS)


def test_a_layer_that_lacks_a_weight_is_an_error(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights of a layer, 'layers\.1\.mlp\.up_proj\.weight'"):
        load_base(ModelSource(str(tmp_path / "model"), None, "float32"), LAYERS)


@pytest.mark.parametrize("more", ["mlp.up_proj.lora_A.default.weight", "mlp.up_proj.weight_scale_inv"])
def test_weights_that_loading_would_leave_out_are_errors(more, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = {**load_file(file), f"model.layers.1.{more}": torch.ones(4)}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"leave out 1 of the checkpoint's tensors, '.*layers\.1\.{re.escape(more)}'"):
        load_base(ModelSource(str(tmp_path / "model"), None, "float32"), LAYERS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"host_memory": "1GB"}, {"host_memory": 10**9}),
        ({"max_memory": ["0=2GB", "cpu=1GB"]}, {"max_memory": {0: 2 * 10**9, "cpu": 10**9}}),
    ],
)
def test_limits_of_memory(given, expected):
    assert parse_sharding("layers", given).options == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"max_memory": ["disk=1GB"]}, "--max-memory disk: expected devices or cpu"),
        ({"max_memory": ["cpu=1GB"], "host_memory": "1GB"}, "expected it or --max-memory cpu, got both"),
        ({"offload": "cpu"}, "--offload: expected with --sharding zero3"),
    ],
)
def test_wrong_limits_are_refused(given, error):
    with pytest.raises(ConfigError, match=error):
        parse_sharding("layers", given)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process give up pages that it has mapped")
@pytest.mark.parametrize(("dtype", "while_used"), [("float32", True), ("bfloat16", False)])
def test_pages_of_a_layer_are_let_go_with_it(dtype, while_used, tmp_path, monkeypatch):
    advice, advise = [], layer_reader._advise
    monkeypatch.setattr(layer_reader, "_advise", lambda *a: advice.append((a[2], advise(*a))))
    config = hf.LlamaConfig(**{**LLAMA_LIKE, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8})
    source = save_random(config, tmp_path)
    file, size = tmp_path / "model.safetensors", 4 * (3 * 256 * 1024)  # of the layer's MLP
    reader = executor_of(load_base(ModelSource(source.name, None, dtype), LAYERS)).reader
    before, weight = mapped_bytes(file), reader.take(0).mlp.down_proj.weight.detach().clone()
    assert (mapped_bytes(file) - before >= size) == while_used
    reader.drop(0)
    assert advice[::2] == [(layer_reader._MADV_COLD, 0)] * (len(advice) // 2)
    assert advice[1::2] == [(mmap.MADV_DONTNEED, 0)] * (len(advice) // 2)
    assert mapped_bytes(file) - before < size / 4
    assert torch.equal(reader.take(0).mlp.down_proj.weight, weight)


def mapped_bytes(file):
    """Bytes of a file that this process has mapped."""
    found, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_file = line.endswith(str(file))
        elif of_file and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found
