"""Tiny random models of the real classes, saved as a user would find them: config, safetensors, tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from aura_dist.text.table import read_table

DEMO_SENTENCES = Path(__file__).parents[1] / "aura_dist" / "demo" / "sentences.csv"
VOCAB = 384
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA_LIKE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# name → a configuration; widths that 16 does not divide are among them
TINY_CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(**COMMON, n_embd=48, n_layer=3, n_head=4, n_positions=256),
    "falcon-rotary": lambda: hf.FalconConfig(
        **COMMON, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, multi_query=True, parallel_attn=True,
        alibi=False, bias=False,
    ),
    "falcon-alibi": lambda: hf.FalconConfig(
        **COMMON, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, multi_query=True, parallel_attn=False,
        alibi=True, bias=True,
    ),
    "falcon-40b-style": lambda: hf.FalconConfig(
        **COMMON, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_kv_heads=2,
        new_decoder_architecture=True, alibi=False, bias=False,
    ),
    "mpt": lambda: hf.MptConfig(**COMMON, d_model=48, n_layers=3, n_heads=4, max_seq_len=256, expansion_ratio=2),
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE, sliding_window=32),
    "gemma3": lambda: hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=12, sliding_window=32, sliding_window_pattern=2),
    "opt": lambda: hf.OPTConfig(
        **COMMON, hidden_size=48, word_embed_proj_dim=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "bloom": lambda: hf.BloomConfig(**COMMON, hidden_size=48, n_layer=3, n_head=4),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA_LIKE, head_dim=12),
    "phi3": lambda: hf.Phi3Config(**LLAMA_LIKE),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    ),
}  # fmt: skip

# name → what is found in few models: latent attention and residuals scaled by the number of layers; linear
# attention beside the usual; a router that is a linear layer; recurrent layers
ODD_CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "minicpm3": lambda: hf.MiniCPM3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 4}, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12,
    ),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **LLAMA_LIKE, head_dim=12, layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=12,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32,
    ),
    "phimoe": lambda: hf.PhimoeConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(
        **LLAMA_LIKE, head_dim=12, lru_width=48, attention_window_size=32,
    ),
}  # fmt: skip

# name → experts as 3-D parameters: nothing else; latent attention, shared experts after a dense layer; biases, sinks;
# more than ten of them; the router's weight on their input
MIXTURE_CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "mixtral": lambda: hf.MixtralConfig(**LLAMA_LIKE, head_dim=12, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 4}, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1,
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **LLAMA_LIKE, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
    ),
    "olmoe": lambda: hf.OlmoeConfig(**LLAMA_LIKE, num_experts=12, num_experts_per_tok=3),
    "llama4": lambda: hf.Llama4TextConfig(
        **LLAMA_LIKE, head_dim=12, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=96,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip

# name → state-space layers beside attention: no piece of several tokens follows Jamba's state; Bamba counts positions
# from 0 in every forward that is not told them
HYBRID_CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "jamba": lambda: hf.JambaConfig(
        **LLAMA_LIKE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=2,
    ),
    "bamba": lambda: hf.BambaConfig(
        **LLAMA_LIKE, attn_layer_indices=[1], mamba_n_heads=12, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16,
    ),
}  # fmt: skip


def tiny_causal(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model whose outputs are of order 1, so that errors show."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config((TINY_CONFIGS | ODD_CONFIGS | MIXTURE_CONFIGS | HYBRID_CONFIGS)[name]())
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.ndim == 2 or (parameter.ndim == 3 and ".experts." in place):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "bias" in name or parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny(name: str, directory: Path, *, seed: int = 0, special_bos: bool = True, **save: Any) -> Path:
    """Save a tiny model and a tokenizer trained on the bundled sentences; returns the directory."""
    tiny_causal(name, seed).save_pretrained(directory, **save)
    tiny_tokenizer(special_bos=special_bos).save_pretrained(directory)
    return directory


def tiny_tokenizer(*, special_bos: bool = True) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` entries that puts `<bos>` in front, like Llama's and Gemma's."""
    from tokenizers.decoders import ByteLevel
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(read_table(str(DEMO_SENTENCES), ["text"]).columns["text"], trainer)
    if special_bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
