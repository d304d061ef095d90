"""What is written stays written: interruption, resume, failing writes, damaged chunks, flat memory."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.store import writer as writer_module
from aura_dist.store.access import open_group
from aura_dist.store.record import most_attempted, nonfinite_responses, unfinished
from tests.memory import peak_of
from tests.models import LLAMA_LIKE, tiny_tokenizer

FLAT = 1.05


def arguments(model, data, store, *more):
    return [
        "collect", "--model", str(model), "--data", str(data), "--concepts", "toxic", "--store", str(store),
        "--tokens-per-batch", "128", "--pooling", "max", "mean", *more,
    ]  # fmt: skip


def chunk_files(store: Path) -> dict[str, bytes]:
    """Every chunk of responses, samples and progress by its path."""
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.glob("*/**/c/**/*")) if f.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_dir, sentences_csv, tmp_path_factory):
    """An uninterrupted store of all 480 sentences."""
    store = tmp_path_factory.mktemp("whole") / "store.zarr"
    assert main(arguments(tiny_dir("llama"), sentences_csv, store)) == 0
    return store


@pytest.mark.parametrize("batches", [1, 7, 30])
def test_resumed_equals_uninterrupted_bit_for_bit(batches, whole, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    run, count = Capture.run, 0

    def interrupted(self, *args):
        nonlocal count
        count += 1
        if count > batches:
            raise KeyboardInterrupt
        run(self, *args)

    monkeypatch.setattr(Capture, "run", interrupted)
    assert main(command) == 130
    monkeypatch.setattr(Capture, "run", run)
    assert main(["score", "--store", str(store)]) == 2, "an unfinished store is not scored"
    assert main(command) == 0
    assert chunk_files(store) == chunk_files(whole)


def fail_always(monkeypatch, error):
    """Every launch dies in the batch after the fifth."""
    run, turns = Capture.run, {"left": 0}

    def failing(self, *args):
        turns["left"] -= 1
        if turns["left"] < 0:
            raise error
        run(self, *args)

    monkeypatch.setattr(Capture, "run", failing)

    def attempt(command):
        turns["left"] = 5
        return main(command)

    return attempt


def test_task_in_which_three_launches_died_stops_the_fourth(whole, tiny_dir, sentences_csv, tmp_path, capsys):
    store = tmp_path / "store.zarr"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    with pytest.MonkeyPatch.context() as patch:
        attempt = fail_always(patch, RuntimeError("CUDA error: an illegal memory access was encountered"))
        for _ in range(3):
            with pytest.raises(RuntimeError):
                attempt(command)
            assert "launches died" not in capsys.readouterr().err
        assert attempt(command) == 2
    assert re.search(
        "error: --store .*: 3 launches died in task [0-9]+ .*continue with --max-attempts 4", capsys.readouterr().err
    )
    assert main([*command, "--max-attempts", "4"]) == 0
    assert chunk_files(store) == chunk_files(whole)


def test_orderly_ends_are_not_counted(whole, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    with pytest.MonkeyPatch.context() as patch:
        attempt = fail_always(patch, KeyboardInterrupt())
        assert [attempt(command) for _ in range(4)] == [130] * 4
    assert most_attempted(open_group(str(store))) == (min(unfinished(open_group(str(store)))), 0)
    assert main(command) == 0
    assert chunk_files(store) == chunk_files(whole)


def test_no_store_is_made_within_another(whole, tiny_dir, sentences_csv, capsys):
    for inner in ("inner.zarr", "activations/inner.zarr"):
        assert main(arguments(tiny_dir("llama"), sentences_csv, whole / inner)) == 2
        assert f"expected a place outside any store, got one within {str(whole)!r}" in capsys.readouterr().err
        assert not (whole / inner).exists()


def test_linked_store_is_replaced_where_it_lies(whole, tiny_dir, sentences_csv, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    few = arguments(tiny_dir("llama"), sentences_csv, tmp_path / "link", "--num-positive", "8", "--num-negative", "8")
    for command in (few, few, [*few, "--overwrite"]):
        assert main(command) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "scratch" / "zarr.json").is_file()


def test_finished_store_is_left_alone(whole, tiny_dir, sentences_csv, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in whole.rglob("*") if f.is_file()}
    monkeypatch.setattr("aura_dist.models.on_disk.load_base", None)
    assert main(arguments(tiny_dir("llama"), sentences_csv, whole)) == 0
    assert {f: f.stat().st_mtime_ns for f in whole.rglob("*") if f.is_file()} == before


def test_store_that_was_never_finished_being_made_is_made_anew(whole, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(whole, store)
    metadata = store / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"created": true', '"created": false'))
    assert main(["score", "--store", str(store)]) == 2
    assert main(arguments(tiny_dir("llama"), sentences_csv, store)) == 0
    assert chunk_files(store) == chunk_files(whole)


def test_failing_write_stops_the_run_with_its_error(whole, tiny_dir, sentences_csv, tmp_path, monkeypatch, capsys):
    store = tmp_path / "store.zarr"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    writes = writer_module.ChunkWriter._writes

    async def failing():
        raise OSError(28, "No space left on device")

    def full_disk(self, rows, buffer):
        prepared = writes(self, rows, buffer)
        return [*prepared[:2], failing, *prepared[3:]] if rows.start < 320 else prepared

    monkeypatch.setattr(writer_module.ChunkWriter, "_writes", full_disk)
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device" in error
    monkeypatch.setattr(writer_module.ChunkWriter, "_writes", writes)
    assert main(command) == 0
    assert chunk_files(store) == chunk_files(whole)


def test_missing_chunk_is_named_and_nothing_written_for_it(whole, tmp_path, capsys):
    store = tmp_path / "store.zarr"
    shutil.copytree(whole, store)
    chunk = store / "activations" / "model.layers.1.mlp.up_proj" / "max" / "c" / "2" / "0"
    chunk.unlink()
    assert main(["score", "--store", str(store)]) == 2
    assert f"the chunk {str(chunk)!r} is missing" in capsys.readouterr().err
    assert not (store / "scores" / "model.layers.1.mlp.up_proj" / "max" / "c").exists()


def test_flipped_bit_is_an_error_that_names_the_chunk(whole, tmp_path, capsys):
    store = tmp_path / "store.zarr"
    shutil.copytree(whole, store)
    chunk = store / "activations" / "model.layers.1.mlp.up_proj" / "max" / "c" / "2" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    assert main(["score", "--store", str(store)]) == 2
    assert str(chunk) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["progress/done", "progress/attempts"])
def test_mark_that_was_cut_short_is_one_that_was_never_made(name, whole, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(whole, store)
    for mark in ("progress/done", name):
        (store / mark / "c" / "1").write_bytes(b"")
    assert unfinished(open_group(str(store))) == [1]
    assert main(arguments(tiny_dir("llama"), sentences_csv, store)) == 0
    assert chunk_files(store) == chunk_files(whole)


@pytest.mark.parametrize("name", ["samples/num_tokens", "samples/label", "progress/done"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_record_is_one_error_that_names_it(name, damage, whole, tmp_path, capsys):
    store = tmp_path / "store.zarr"
    shutil.copytree(whole, store)
    described = store / name / "zarr.json"
    if damage == "gone":
        described.unlink()
    elif damage == "cut":
        described.write_text(described.read_text()[:50])
    else:
        chunk = next(f for f in sorted((store / name / "c").glob("**/*")) if f.is_file())
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    assert main(["score", "--store", str(store)]) == 2
    assert f"expected an array '{name}', found it missing or damaged" in capsys.readouterr().err.splitlines()[-1]


def test_responses_that_are_not_finite_are_counted_and_named(tiny_dir, sentences_csv, tmp_path, caplog):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_dir("gpt2"))
    model.transformer.h[2].mlp.c_fc.bias.data[5] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    store = tmp_path / "store.zarr"
    assert main(arguments(tmp_path / "model", sentences_csv, store, "--num-positive", "8", "--num-negative", "8")) == 0
    counted = nonfinite_responses(open_group(str(store)))
    assert counted["activations/transformer.h.2.mlp.c_fc/max"] == 16
    assert counted["activations/transformer.h.2.mlp.c_proj/max"] == 16 * 48, "what follows an infinity is not finite"
    assert not any("h.1." in name for name in counted)


def test_layer_that_gives_nothing_but_nan_is_stored_scored_and_left_alone(tiny_dir, sentences_csv, tmp_path, capsys):
    """NaN is what chunks are filled with, and a chunk that is not there counts as lost."""
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    model.model.layers[2].mlp.up_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    store, fitted = tmp_path / "store.zarr", str(tmp_path / "aura")
    rows = ["--num-positive", "20", "--num-negative", "20"]
    assert main(arguments(tmp_path / "model", sentences_csv, store, *rows)) == 0
    assert main(["score", "--store", str(store)]) == 0
    assert f"{2 * (80 + 48)} neurons have NaN responses and so no score" in capsys.readouterr().err
    view = aura_dist.open_store(store)
    spoilt = ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    for site in view["scores"].children:
        for pooling in ("max", "mean"):
            scores = view["scores"][site][pooling]
            assert bool(np.isnan(scores["auroc"]).all()) == (site in spoilt)
            assert bool(np.isnan(scores["q_value"]).all()) == (site in spoilt)
            assert bool((scores["num_distinct"] == 0).all()) == (site in spoilt)
    assert main(["fit", "--store", str(store), "--concept", "toxic", "--out", fitted]) == 0
    scale = aura_dist.Intervention.load(fitted).scale
    assert all((scale[site] == 1).all() for site in spoilt if site in scale)
    assert any((values < 1).any() for values in scale.values())


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model whose pooled responses outweigh it: 133 KB a row."""
    directory = tmp_path_factory.mktemp("wide")
    config = hf.LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 4096, "num_hidden_layers": 4, "hidden_size": 16})
    hf.LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_memory_of_collect_does_not_grow_with_the_rows(wide_model, tmp_path):
    # texts of one length, small batches: the allocator's fragmentation would blur what is measured
    peaks = {}
    for rows in (500, 2000):
        data = tmp_path / f"{rows}.csv"
        data.write_text("text,toxic\n" + "".join(f"{'word ' * 20},{i % 2}\n" for i in range(rows)))
        command = ["--model", str(wide_model), "--data", str(data), "--concepts", "toxic"]
        store = str(tmp_path / f"{rows}.zarr")
        peaks[rows] = peak_of(["collect", *command, "--tokens-per-batch", "512", "--store", store])
    assert peaks[2000] <= FLAT * peaks[500], peaks
