"""A quantised checkpoint that is refused comes with the command that converts it once, and that command works."""

import json
import shlex

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aura_dist.errors import ModelError
from aura_dist.models.load import ModelSource, load_base
from tests.layerwise import LAYERS, batches, by_layer
from tests.models import LLAMA_LIKE, tiny_tokenizer

WIDE = {**LLAMA_LIKE, "hidden_size": 64, "intermediate_size": 128}  # bitsandbytes takes blocks of 64 on some processors
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def written(directory, config):
    """The weights of a random model that is saved there; those of its layers' matrices."""
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    return weights, [name for name, weight in weights.items() if ".layers." in name and weight.ndim >= 2]


def overwrite(directory, stored, quantization):
    """Store the weights instead, and say how they are quantised."""
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def save_fp8(directory, config=None):
    stands_for, names = written(directory, config or hf.LlamaConfig(**WIDE))
    stored = dict(stands_for)
    for name in [name for name in names if not name.endswith("gate.weight")]:  # a mixture's router
        scale = stands_for[name].abs().max() / 448
        stored[name] = (stands_for[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"], stands_for[name] = scale.reshape(1, 1), stored[name].float() * scale
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    overwrite(directory, stored, how)
    return stands_for


def save_compressed_tensors(directory):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    stands_for, names = written(directory, hf.LlamaConfig(**WIDE))
    stored = dict(stands_for)
    for name in names:
        scale = stands_for[name].abs().amax(1, keepdim=True) / 127
        stored[name], stored[f"{name}_scale"] = (stands_for[name] / scale).round().to(torch.int8), scale
        stands_for[name] = stored[name] * scale
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    how = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    overwrite(directory, stored, how)
    return stands_for


def save_mxfp4(directory):
    """Experts as random blocks of 32 numbers of four bits, two a byte, and the exponent of each block."""
    more = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
    stands_for, names = written(directory, hf.GptOssConfig(**WIDE, **more))
    stored, random = dict(stands_for), torch.Generator().manual_seed(0)
    for name in [name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, width, out = stored.pop(name).shape
        shape = (num_experts, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8, generator=random)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
        stands_for[name] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    overwrite(directory, stored, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return stands_for


def save_bitsandbytes(directory, error, **how):
    """The quantised weights as bitsandbytes reads them, which are within `error` of the largest plain one of each."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quantization`)")
    plain, _ = written(directory, hf.LlamaConfig(**WIDE))
    given = {"quantization_config": hf.BitsAndBytesConfig(**how), "dtype": "bfloat16"}
    hf.AutoModelForCausalLM.from_pretrained(directory, **given).save_pretrained(directory)
    read = hf.AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16").dequantize().state_dict()
    assert all((read[name].float() - plain[name]).abs().max() <= error * plain[name].abs().max() for name in plain)
    return read


SAVERS = {
    "fp8": save_fp8,
    "fp8, a mixture": lambda directory: save_fp8(
        directory, hf.Qwen3MoeConfig(**WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "compressed-tensors": save_compressed_tensors,
    "mxfp4": save_mxfp4,
    "bitsandbytes:8bit": lambda directory: save_bitsandbytes(directory, 0.01, load_in_8bit=True),
    "bitsandbytes:nf4": lambda d: save_bitsandbytes(d, 0.2, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # the command passes how to load it
@pytest.mark.parametrize("kind", SAVERS)
def test_the_command_converts_it(kind, tmp_path, monkeypatch):
    model = tmp_path / "it's a $HOME"
    stands_for = SAVERS[kind](model)
    with pytest.raises(ModelError, match=r"not quantised with --sharding layers; .* or convert it once: ") as refused:
        load_base(ModelSource(str(model), None, "float32"), LAYERS)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(str(refused.value).partition("convert it once: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    assert (tmp_path / "CONVERTED" / "tokenizer.json").exists()
    converted = load_file(tmp_path / "CONVERTED" / "model.safetensors")
    assert converted.keys() == stands_for.keys()
    for name, weight in converted.items():
        torch.testing.assert_close(weight.float(), stands_for[name].float(), rtol=2**-6, atol=1e-6)
    model = load_base(ModelSource("CONVERTED", None, "bfloat16"), LAYERS)
    assert all(torch.isfinite(found).all() for found in by_layer(model, batches()))
