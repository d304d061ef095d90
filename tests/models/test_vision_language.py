"""The language part of vision-language checkpoints: texts run as in transformers, and no image is waited for."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import aura_dist
from aura_dist.cli import main
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import ModelError
from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.sampling import Decoding
from aura_dist.models.load import ModelSource, load_base, load_causal, skeleton
from aura_dist.ranks.world import World
from aura_dist.sites.find import find_sites
from aura_dist.stages import collect
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from tests.distributed.launch import run_ranks
from tests.distributed.loop import OPTIONS, run_plan
from tests.models import DEMO_SENTENCES, LLAMA_LIKE, tiny_tokenizer

IDS = torch.arange(9, 33).reshape(2, 12)
TEXTS = [f"a text of some words number {i} {'and more ' * (i % 5)}" for i in range(12)]
# more layers in the tower than in the decoder, as in Qwen2.5-VL 7B
CONFIGS = {
    "gemma3": lambda: hf.Gemma3Config(
        text_config={**LLAMA_LIKE, "head_dim": 12, "sliding_window": 32, "sliding_window_pattern": 2},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6, image_token_index=7,
    ),
    "qwen2.5-vl": lambda: hf.Qwen2_5_VLConfig(
        text_config={**LLAMA_LIKE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
        vision_config={
            "depth": 5, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": 48, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=7, video_token_id=8, vision_start_token_id=5, vision_end_token_id=6,
    ),
}  # fmt: skip


def whole(name):
    """A random model with its tower, as transformers makes it."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name → (model, its directory)."""
    made = {name: (whole(name), tmp_path_factory.mktemp(name)) for name in CONFIGS}
    for model, directory in made.values():
        model.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    return {name: (model, str(directory)) for name, (model, directory) in made.items()}


@pytest.fixture(params=CONFIGS)
def saved(request, checkpoints):
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def alone(checkpoints, sentences_csv, tmp_path_factory):
    """The stores of one process, as `run_plan` collects them."""
    out = tmp_path_factory.mktemp("alone")
    for name, (_, directory) in checkpoints.items():
        settings = {"model": directory, "data": sentences_csv, "concepts": ["toxic"], **OPTIONS}
        collect.run(CollectConfig(store=str(out / name), **settings))
    return out


@pytest.mark.timeout(420)
@pytest.mark.parametrize("sharding", ["fsdp", "tensor", pytest.param("zero3", marks=pytest.mark.slow)])
def test_store_of_several_ranks_equals_that_of_one_process(sharding, checkpoints, alone, sentences_csv, tmp_path):
    runs = {directory: str(tmp_path / name) for name, (_, directory) in checkpoints.items()}
    plan = {"sharding": sharding, "options": OPTIONS, "data": sentences_csv, "runs": runs, "notes": str(tmp_path)}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run_ranks(2, [str(tmp_path / "plan.json")], run_plan, timeout_seconds=400)
    assert json.loads((tmp_path / "rank-0.json").read_text())["refused"] == {}
    for name in checkpoints:
        ours, expected = open_group(str(tmp_path / name)), open_group(str(alone / name))
        for path in response_names(expected):
            np.testing.assert_allclose(read_array(ours, path), read_array(expected, path), rtol=1e-4, atol=1e-5)


def test_only_the_language_part_is_loaded(saved):
    model, directory = saved
    source = ModelSource(directory, None, "float32")
    causal, base = load_causal(source, World()), load_base(source, World(), num_layers=2)
    assert type(causal) is type(model)
    names = {name for name, _ in causal.named_parameters()}
    assert names == {n for n, _ in model.named_parameters() if "vision_tower" not in n and "visual" not in n}
    assert len(base.language_model.layers) == 2
    sites = find_sites(skeleton(causal.config, source))
    assert sites == find_sites(model)
    assert {site.name.rpartition(".layers.")[0] for site in sites.sites} == {"model.language_model"}
    with torch.no_grad():
        assert torch.equal(causal(input_ids=IDS).logits, model(input_ids=IDS).logits)
        hidden = model.model(input_ids=IDS, output_hidden_states=True).hidden_states[1]
        assert torch.equal(base(input_ids=IDS, output_hidden_states=True).hidden_states[1], hidden)


def test_stores_hold_what_transformers_computes(saved, tmp_path):
    model, directory = saved
    sites = [f"model.language_model.layers.{n}.{m}" for n in (0, 2) for m in ("self_attn.q_proj", "mlp.down_proj")]
    tokenizer, seen, hooks = tiny_tokenizer(), {name: [] for name in sites}, []
    for given, store in ((directory, "disk"), (model, "memory")):
        more = {} if given is directory else {"tokenizer": tokenizer}
        labels = [i % 2 for i in range(12)]
        aura_dist.collect(given, TEXTS, labels, store=tmp_path / store, modules=["all"], **more)
    groups = [open_group(str(tmp_path / store)) for store in ("disk", "memory")]
    for name in sites:
        hook = lambda _m, _a, out, n=name: seen[n].append(out[0].amax(dim=0).numpy())  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        for row in np.asarray(groups[0]["samples/row"]):
            model(**tokenizer(TEXTS[row], return_tensors="pt", return_token_type_ids=False))
    for hook in hooks:
        hook.remove()
    for name in sites:
        for group in groups:
            ours = np.asarray(group[f"activations/{name}/max"])
            np.testing.assert_allclose(ours, np.stack(seen[name]), rtol=1e-5, atol=1e-5)


def test_every_verb_runs_and_folds(saved, tmp_path, capsys):
    model, directory = saved
    store, fitted, exported = (str(tmp_path / name) for name in ("S.zarr", "aura", "E"))
    data = ["--data", str(DEMO_SENTENCES), "--concepts", "toxic", "--num-positive", "24", "--num-negative", "24"]
    assert main(["plan", "--model", directory, *data, "--json"]) == 0
    loaded = load_base(ModelSource(directory, None, "float32"), World(), num_layers=3)
    planned = json.loads(capsys.readouterr().out)["weights_bytes"]
    assert planned == sum(t.nbytes for t in [*loaded.parameters(), *loaded.buffers()])
    assert main(["collect", "--model", directory, *data, "--store", store]) == 0
    assert main(["score", "--store", store, "--statistics", "auroc"]) == 0
    assert main(["fit", "--store", store, "--concept", "toxic", "--out", fitted]) == 0
    acting = ["--model", directory, "--intervention", fitted]
    assert main(["generate", *acting, "--prompt", "the", "--max-new-tokens", "4"]) == 0
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(TEXTS))
    assert main(["evaluate", *acting, "--perplexity-texts", str(tmp_path / "t.csv"), "--out", f"{store}.json"]) == 0
    assert main(["export", *acting, "--out", exported]) == 0
    with torch.no_grad():
        folded = hf.AutoModelForImageTextToText.from_pretrained(exported)(input_ids=IDS).logits
        with aura_dist.intervene(model, aura_dist.Intervention.load(fitted)):
            hooked = model(input_ids=IDS).logits
    torch.testing.assert_close(folded, hooked, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(folded, model(input_ids=IDS).logits, atol=1e-3)
    tower = {n: t for n, t in load_file(f"{directory}/model.safetensors").items() if "vis" in n}
    assert tower
    written = load_file(f"{exported}/model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tower.items())


def test_continuations_need_no_cache(saved):
    """With the cache as from the whole text, also after transformers' own `generate` with another batch."""
    model, directory = saved
    causal = load_causal(ModelSource(directory, None, "float32"), World())
    causal.generate(input_ids=IDS[:, :4].repeat(2, 1), max_new_tokens=3, do_sample=False)
    how = Decoding(1, 6, 0.0, 1.0, 0)
    found = Decoder(causal, how, ()).run(Rows([IDS[0].tolist()], [0], [0]))[0]
    ids = IDS[:1]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert found == ids[0, 12:].tolist()


def test_model_that_asks_for_an_image_is_refused():
    text = hf.OPTConfig(**{**LLAMA_LIKE, "word_embed_proj_dim": 48, "ffn_dim": 80})
    config = hf.Blip2Config(text_config=text.to_dict(), vision_config={"num_hidden_layers": 1}, qformer_config={})
    with pytest.raises(ModelError, match="'blip-2' is not a causal language model: expected a decoder that reads text"):
        skeleton(config)
