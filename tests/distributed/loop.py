"""Every rank of a launch runs this: collect each model under one strategy, and say which it refused.

    torchrun --nproc-per-node N tests/distributed/loop.py PLAN.json

The plan: `sharding`, `options` (further settings of collect), `runs` (model directory → store), `data`, `report`.
"""

import json
import os
import sys
from pathlib import Path

import torch

from aura_dist.config import CollectConfig
from aura_dist.errors import AuraError
from aura_dist.stages import collect


def main() -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    refused = {}
    for model, store in plan["runs"].items():
        settings = {"data": plan["data"], "concepts": ["toxic"], "sharding": plan["sharding"], **plan["options"]}
        config = CollectConfig(model=model, store=store, **settings)
        try:
            collect.run(config)
        except AuraError as error:
            refused[model] = f"{type(error).__name__}: {error}"
    if os.environ.get("RANK", "0") == "0":
        Path(plan["report"]).write_text(json.dumps(refused))


if __name__ == "__main__":
    main()
