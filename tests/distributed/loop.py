"""Every rank of a launch runs this: collect each model under one strategy, and note what happened.

The plan: `sharding`, `options` (further settings of collect), `runs` (model directory → store), `data`, `notes` (a
directory: rank 0 notes the models that were refused, every rank the data it read, the shards it wrote and how many
parameters were whole at once).
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import FSDPModule

import aura_dist
from aura_dist.collecting import description
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import AuraError
from aura_dist.models import on_disk
from aura_dist.sites.pooling import TOKENS
from aura_dist.stages import collect
from aura_dist.store.writer import ChunkWriter, RowBuffer

OPTIONS = {
    "num_positive": 30, "num_negative": 30, "tokens_per_batch": 512, "pooling": ["max", "mean"],
}  # fmt: skip
EXPERTS_ALONE = ("mixtral", "qwen3_moe", "gpt_oss")  # types of models whose MLPs are experts


def modules_of(model: str) -> list[str]:
    """The kinds of sites that are collected from a model in a directory."""
    has_neurons = json.loads((Path(model) / "config.json").read_text())["model_type"] not in EXPERTS_ALONE
    return ["all", "norm", "heads", "residual", *(["neurons"] if has_neurons else [])]


def record_writes(written: Counter[str]) -> None:
    """Count how often each shard is written from here, and check that it is written whole."""
    writes = ChunkWriter._writes

    def recorded(self: ChunkWriter, rows: slice, buffer: RowBuffer) -> list:
        for key in buffer:
            array = self._arrays[key]
            assert rows.start % array.shards[0] == 0
            assert rows.stop == min(rows.start + array.shards[0], array.shape[0])
            for start, stop in self._owned[key[0]]:
                assert start % array.shards[1] == 0
                assert stop % array.shards[1] == 0 or stop == array.shape[1]
                for column in range(start, stop, array.shards[1]):
                    written[f"{array.store_path} {rows.start} {column}"] += 1
        return writes(self, rows, buffer)

    ChunkWriter._writes = recorded
    token_writes = ChunkWriter._token_writes

    def recorded_tokens(self: ChunkWriter, site: str, place: int, values_TD: NDArray) -> list:
        array = self._arrays[site, TOKENS]
        assert place % array.shards[0] == 0
        assert values_TD.shape[1] == array.shape[1]
        for start in range(place, place + len(values_TD), array.shards[0]):
            written[f"{array.store_path} {start} 0"] += 1
        return token_writes(self, site, place, values_TD)

    ChunkWriter._token_writes = recorded_tokens


def record_reads(read: list[str]) -> None:
    """Note each data file that is read from here."""
    original = description.read_table

    def recorded(source, *args, **kwargs):
        read.append(source)
        return original(source, *args, **kwargs)

    description.read_table = recorded


def num_whole(model: nn.Module) -> int:
    """Parameters that are gathered or under way now, under FSDP2 or ZeRO 3."""
    total = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None and group.is_unsharded:
                total += sum(p._orig_size.numel() for p in group.fsdp_params)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_status") and parameter.ds_status.name != "NOT_AVAILABLE":
            total += parameter.ds_numel
    return total


def measure_whole(most: list[int]) -> None:
    """Note the most parameters that are gathered at once, looking whenever a linear layer is about to run."""
    load = on_disk.load_base

    def measured(*args, **kwargs):
        model = load(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_pre_hook(lambda *_: most.__setitem__(0, max(most[0], num_whole(model))))
        return model

    on_disk.load_base = measured


def run_plan(arguments: Sequence[str]) -> int:
    """Run the plan in the file that is named."""
    plan = json.loads(Path(arguments[0]).read_text())
    refused, whole, written, read, most = {}, {}, Counter[str](), [], [0]
    record_writes(written)
    record_reads(read)
    measure_whole(most)
    for model, store in plan["runs"].items():
        settings = {"modules": modules_of(model), "sharding": plan["sharding"], **plan["options"]}
        settings |= {"data": plan["data"], "concepts": ["toxic"]}
        most[0] = 0
        try:
            collect.run(CollectConfig(model=model, store=store, **settings))
        except AuraError as error:
            refused[model] = f"{type(error).__name__}: {error}"
        whole[model] = most[0]
    notes, rank = Path(plan["notes"]), os.environ.get("RANK", "0")
    found = {"refused": refused, "whole": whole, "written": written, "read": read}
    (notes / f"rank-{rank}.json").write_text(json.dumps(found))
    return 0


def run_in_memory(arguments: Sequence[str]) -> int:
    """Collect the texts and labels of a CSV file, held in memory, from a model into a store."""
    model, data, store = arguments
    with open(data, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts, labels = ([row[name] for row in rows] for name in ("text", "toxic"))
    settings = {"modules": modules_of(model), **OPTIONS}
    aura_dist.collect(model, texts, {"toxic": list(map(int, labels))}, store=store, **settings)
    return 0


def run_tokens(arguments: Sequence[str]) -> int:
    """Run the collections in the file that is named, a list of settings, and note the shards that this rank wrote."""
    file, written = Path(arguments[0]), Counter[str]()
    record_writes(written)
    for settings in json.loads(file.read_text()):
        collect.run(CollectConfig(**settings))
    file.with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(written))
    return 0
