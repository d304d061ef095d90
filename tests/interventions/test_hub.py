"""Pushing to and pulling from a hub that answers as the real one does, and the card."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from aura_dist.errors import StoreError
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, Intervention
from aura_dist.interventions.hub import card

META = {
    "method": "damp",
    "parameters": {"pooling": "max", "top_k": 3, "alpha": 0.5},
    "concept": "toxic",
    "model": {"name": "some/model", "fingerprint": "f" * 64},
    "data": {"path": "/home/of/someone/comments.csv", "sha256": "d" * 64, "sampling": {"num_positive": 500, "seed": 0}},
}


def example(**meta):
    return Intervention({"a.b": np.array([0.5, 1, 1], np.float32)}, {"a.b": np.zeros(3, np.float32)}, {**META, **meta})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Directories in place of repositories."""
    place = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            if self.token == "wrong":
                raise OSError("401 unauthorized")
            (place / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub://{repo_id}")

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        if not (place / repo_id).is_dir():
            raise OSError(f"404: {repo_id}")
        taken = tmp_path / "cache"
        taken.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (place / repo_id / name).is_file():
                shutil.copy(place / repo_id / name, taken)
        return str(taken)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return place


def test_what_is_pulled_is_what_was_pushed(hub):
    pushed = example()
    assert pushed.push_to_hub("me/damped") == "hub://me/damped"
    assert {p.name for p in (hub / "me/damped").iterdir()} == {META_FILE, WEIGHTS_FILE, "README.md"}
    pulled = Intervention.from_hub("me/damped")
    assert pulled.digest == pushed.digest
    assert dict(pulled.meta) == {**META, "data": {**META["data"], "path": "comments.csv"}}


def test_paths_of_this_machine_stay_here(hub, tmp_path):
    local = example(model={"name": str(tmp_path), "fingerprint": "f" * 64})
    (local @ local).push_to_hub("me/both")
    written = "".join(p.read_text() for p in (hub / "me/both").iterdir() if p.name != WEIGHTS_FILE)
    assert str(tmp_path) not in written
    assert "someone" not in written
    assert written.count(f'"{tmp_path.name}"') == 3
    assert written.count('"comments.csv"') == 2


def test_what_the_hub_refuses_is_an_error(hub):
    with pytest.raises(StoreError, match="cannot be pushed to 'me/x': 401"):
        example().push_to_hub("me/x", token="wrong")
    with pytest.raises(StoreError, match="'me/nothing' cannot be pulled: 404"):
        Intervention.from_hub("me/nothing")
    (hub / "me" / "else").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"expected intervention\.json"):
        Intervention.from_hub("me/else")


def test_the_real_signatures_take_what_we_give():
    """The stand-ins above are called by keyword: the real functions must know the same ones."""
    import inspect

    import huggingface_hub as real

    assert {"private", "exist_ok"} <= set(inspect.signature(real.HfApi.create_repo).parameters)
    assert {"repo_id", "folder_path", "commit_message"} <= set(inspect.signature(real.HfApi.upload_folder).parameters)
    assert {"revision", "token", "allow_patterns"} <= set(inspect.signature(real.snapshot_download).parameters)


def test_card_states_method_concept_data_and_figures():
    text = card(example(), "me/damped")
    for said in (
        "base_model: some/model", "# damped", "- method: damp", '"top_k": 3', "- concept: toxic", "comments.csv",
        "num_positive 500", "- modules: 1", "- neurons changed: 1 of 3", 'Intervention.from_hub("me/damped")',
    ):  # fmt: skip
        assert said in text
    assert "/home" not in text


def test_card_names_no_directory_as_a_model_of_the_hub(tmp_path, monkeypatch):
    """The hub refuses a card whose `base_model` is no name of its own, and a local one is somebody else's there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for name in ("runs/tiny", "my models/tiny", "../tiny", "/disk/tiny", "~/tiny", "a/b/c"):
        text = card(example(model={"name": name, "fingerprint": "f" * 64}), "me/damped")
        assert "base_model" not in text, name
        assert f"- model: {Path(name).name} (" in text
    assert "base_model: gpt2\n" in card(example(model={"name": "gpt2"}), "me/damped")


def test_card_of_what_states_nothing():
    text = card(example(model=None, data=None, method=None, parameters=None, concept=None, composed=None), "me/damped")
    assert "- method: unknown" in text
    assert "base_model" not in text


def test_card_of_a_composition_states_both():
    text = card(
        example() @ example(method="aura", model={**META["model"], "name": "/disk/of/someone/model"}), "me/both"
    )
    assert text.count("- method:") == 2
    assert text.index("method: damp") < text.index("after") < text.index("method: aura")
    assert "/disk" not in text
    assert Path("me/both").name in text
