"""A mixture's neurons and routing the plain way: a loop over tokens and experts, as in the models' eager code."""

import torch
import transformers as hf
from torch.nn import functional

from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from tests.poolings import pool_plainly

MIXTURES = (
    "qwen3-moe", "mixtral", "phimoe", "olmoe", "deepseek-v3", "gpt-oss", "llama4", "qwen3-next",
)  # fmt: skip


def hidden(experts, x_H, e):
    """[I] what expert `e` makes of one token before its down projection."""
    kind = type(experts).__name__
    if kind == "GptOssExperts":
        gate_up = x_H @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = gate_up[::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    gate_up = x_H @ experts.gate_up_proj[e] if kind == "Llama4TextExperts" else experts.gate_up_proj[e] @ x_H
    gate, up = gate_up.chunk(2)
    return functional.silu(gate) * up


def loop(experts, x_TH, expert_TK, weight_TK):
    """(neurons [T, E · I], whether a token was sent [T, E], the router's weights [T, E])."""
    num_experts, width = len(experts.down_proj), len(hidden(experts, x_TH[0], 0))
    acts, routed, weights = (x_TH.new_zeros((len(x_TH), num_experts, *w)) for w in ((width,), (), ()))
    for t in range(len(x_TH)):
        for e, weight in zip(expert_TK[t].tolist(), weight_TK[t], strict=True):
            acts[t, e] = hidden(experts, x_TH[t] * (weight if "Llama4" in type(experts).__name__ else 1), e)
            routed[t, e], weights[t, e] = 1, weight
    return acts.flatten(1), routed, weights


def listen(model):
    """Site → a list that fills with (x_TH, expert_TK, weight_TK) at each forward, by ordinary hooks."""
    calls: dict[str, list] = {}
    for site in find_sites(skeleton(model.config)).sites:
        if site.kind != "experts":
            continue
        called, experts = calls.setdefault(site.name, []), model.get_submodule(site.name)
        if "Llama4" in type(experts).__name__:
            block = model.get_submodule(site.name.rpartition(".")[0])

            def keep(_module, args, output, called=called, block=block):
                weight_TK, expert_TK = output[0].topk(block.router.top_k, dim=-1)
                called.append((args[0], expert_TK, weight_TK))

            block.router.register_forward_hook(keep)
        else:
            experts.register_forward_pre_hook(lambda _m, args, called=called: called.append(args))
    return calls


@torch.no_grad()
def plain_mixture(directory, texts, poolings, first=0):
    """(site, pooling) → [N, D] of every experts and routing site, one text at a time; `first` tokens are left out."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()
    tokenizer, calls = hf.AutoTokenizer.from_pretrained(directory), listen(model)
    rows: dict[tuple[str, str], list] = {}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        model(**ids)
        for site, called in calls.items():
            values = loop(model.get_submodule(site), *called.pop())
            for name, acts_TD in zip((site, f"{site}:routed", f"{site}:weight"), values, strict=True):
                for pooling in poolings:
                    rows.setdefault((name, pooling), []).append(
                        pool_plainly(acts_TD[first:], pooling, ids["input_ids"][0, first:])
                    )
    return {key: torch.stack(values).numpy() for key, values in rows.items()}
