"""The intervention as files: what is read is what was written, whole, or an error."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aura_dist.errors import InputError, StoreError
from aura_dist.interventions import artifact
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, Intervention, method_of


def example(seed=0):
    rng = np.random.default_rng(seed)
    scale = {f"model.layers.{i}.mlp": rng.random(4 + i).astype(np.float32) for i in (2, 10, 0)}
    shift = {"model.layers.10.mlp": rng.random(14).astype(np.float32), "only.shifted": np.ones(3, np.float32)}
    return Intervention(scale, shift, {"method": "aura", "seed": seed, "model": {"name": "m"}})


def assert_same(a, b):
    assert a.sites == b.sites
    assert dict(a.meta) == dict(b.meta)
    for first, second in ((a.scale, b.scale), (a.shift, b.shift)):
        assert list(first) == list(second)
        for site, values in first.items():
            assert values.dtype == second[site].dtype == np.float32
            np.testing.assert_array_equal(values, second[site])


def test_round_trip_keeps_values_and_order(tmp_path):
    example().save(tmp_path / "deep" / "aura")
    loaded = Intervention.load(tmp_path / "deep" / "aura")
    assert_same(loaded, example())
    assert loaded.sites == ["model.layers.2.mlp", "model.layers.10.mlp", "model.layers.0.mlp", "only.shifted"]
    assert {p.name for p in (tmp_path / "deep" / "aura").iterdir()} == {WEIGHTS_FILE, META_FILE}


def test_names_in_the_files(tmp_path):
    example().save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {"model.layers.2.mlp.scale", "model.layers.10.mlp.shift", "only.shifted.shift"} <= set(tensors)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / META_FILE).read_text())["method"] == "aura"


def test_views_and_other_dtypes_are_written_by_value(tmp_path):
    values = np.arange(12, dtype=np.float64)
    given = {"reversed": values[::-1], "strided": values[::3], "column": values.reshape(4, 3)[:, 1]}
    Intervention(given).save(tmp_path)
    for site, scale in Intervention.load(tmp_path).scale.items():
        np.testing.assert_array_equal(scale, given[site].astype(np.float32))


def test_meta_cannot_displace_the_sites(tmp_path):
    Intervention({"a": np.ones(2, np.float32)}, meta={"sites": ["b"], "format_version": 9}).save(tmp_path)
    assert Intervention.load(tmp_path).sites == ["a"]


def spoil_json(place: Path, **changes):
    meta = json.loads((place / META_FILE).read_text())
    (place / META_FILE).write_text(json.dumps({**meta, **changes}))


def respoil(place: Path, name: str, values: np.ndarray):
    save_file({**load_file(place / WEIGHTS_FILE), name: values}, place / WEIGHTS_FILE)


DAMAGE = {
    "no directory": lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(),
    "no weights": lambda p: (p / WEIGHTS_FILE).unlink(),
    "no description": lambda p: (p / META_FILE).unlink(),
    "cut weights": lambda p: (p / WEIGHTS_FILE).write_bytes((p / WEIGHTS_FILE).read_bytes()[:-5]),
    "empty weights": lambda p: (p / WEIGHTS_FILE).write_bytes(b""),
    "cut description": lambda p: (p / META_FILE).write_text((p / META_FILE).read_text()[:-9]),
    "description is a list": lambda p: (p / META_FILE).write_text("[]"),
    "description is a number": lambda p: (p / META_FILE).write_text("3"),
    "description without sites": lambda p: (p / META_FILE).write_text('{"format_version": 1}'),
    "description in another encoding": lambda p: (p / META_FILE).write_bytes(b"\xff\xfe{"),
    "later format": lambda p: spoil_json(p, format_version=2),
    "a site more in the description": lambda p: spoil_json(p, sites=[*example().sites, "another"]),
    "a site less in the description": lambda p: spoil_json(p, sites=example().sites[1:]),
    "sites is a number": lambda p: spoil_json(p, sites=3),
    "sites are objects": lambda p: spoil_json(p, sites=[{}]),
    "model is a name": lambda p: spoil_json(p, model="m"),
    "fingerprint is a number": lambda p: spoil_json(p, model={"fingerprint": 3}),
    "parameters are a list": lambda p: spoil_json(p, parameters=[1]),
    "strength": lambda p: spoil_json(p, applied_strength="half"),
    "sampling": lambda p: spoil_json(p, data={"sampling": "all"}),
    "composed of names": lambda p: spoil_json(p, composed=["aura"]),
    "composed of damaged ones": lambda p: spoil_json(p, composed=[{"model": {"name": ["m"]}}]),
    "neither scale nor shift": lambda p: respoil(p, "only.shifted.weight", np.ones(3, np.float32)),
    "a matrix": lambda p: respoil(p, "only.shifted.shift", np.ones((3, 1), np.float32)),
    "integers": lambda p: respoil(p, "only.shifted.shift", np.ones(3, np.int32)),
    "not finite": lambda p: respoil(p, "only.shifted.shift", np.array([1, np.nan, 1], np.float32)),
    "two widths": lambda p: respoil(p, "only.shifted.scale", np.ones(4, np.float32)),
    "other weights": lambda p: save_file({"x.scale": np.ones(2, np.float32)}, p / WEIGHTS_FILE),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_missing_or_damaged_files_are_errors(damage, tmp_path):
    place = tmp_path / "aura"
    example().save(place)
    DAMAGE[damage](place)
    with pytest.raises(StoreError, match="aura"):
        Intervention.load(place)


def test_what_is_null_is_not_stated(tmp_path):
    given = {"model": None, "data": None, "parameters": None, "composed": None}
    Intervention(example().scale, meta=given).save(tmp_path)
    loaded = Intervention.load(tmp_path)
    assert dict(loaded.meta) == given
    assert (loaded @ example()).meta["model"] == {"name": "m"}


def test_unwritable_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(StoreError, match="cannot be written"):
        example().save(tmp_path / "file")


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (({"up": np.array([1, np.inf], np.float32)}, {}), "values in 'up.scale' that are not finite"),
        (({"up": np.ones(2)}, {"up": np.zeros(3)}), "2 and 3 neurons for 'up'"),
    ],
)
def test_what_could_not_be_read_is_not_written_over_what_stands(maps, message, tmp_path):
    """As it comes of strengths and compositions that float32 cannot hold."""
    Intervention({"up": np.ones(2)}, {}, {}).save(tmp_path)
    with pytest.raises(StoreError, match=message):
        Intervention(*maps, {}).save(tmp_path)
    assert Intervention.load(tmp_path).scale["up"].tolist() == [1, 1]


def test_overwriting_replaces_all(tmp_path):
    example(0).save(tmp_path)
    smaller = Intervention({"other": np.zeros(2, np.float32)}, meta={"method": "det0"})
    smaller.save(tmp_path)
    assert_same(Intervention.load(tmp_path), smaller)


@pytest.mark.parametrize("step", range(6))
def test_failing_half_way_never_mixes_two(step, tmp_path, monkeypatch):
    """Fails at the step-th thing that save does to files; what is then read is the old, the new, or an error."""
    example(0).save(tmp_path)
    done = 0

    def failing(function):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step + 1:
                raise OSError("no space left on device")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "save_file", failing(save_file))
        for method in ("write_text", "unlink", "replace", "rename"):
            patch.setattr(Path, method, failing(getattr(Path, method)))
        try:
            example(1).save(tmp_path)
            failed = False
        except StoreError:
            failed = True
    assert failed == (step < 5)
    assert not [p for p in tmp_path.iterdir() if p.name not in {WEIGHTS_FILE, META_FILE}]
    try:
        found = Intervention.load(tmp_path)
    except StoreError:
        return
    assert_same(found, example(found.meta["seed"]))
    assert found.meta["seed"] == (0 if failed else 1)


def test_composition_covers_the_sites_of_both():
    a = Intervention({"x": np.array([0.5, 2], np.float32)}, {"x": np.array([1, 0], np.float32)})
    b = Intervention({"x": np.array([3, 4], np.float32), "y": np.array([0], np.float32)})
    both = b @ a
    assert both.sites == ["x", "y"]
    assert both.scale["x"].tolist() == [1.5, 8]
    assert both.shift["x"].tolist() == [3, 0]
    assert both.scale["y"].tolist() == [0]
    assert "y" not in both.shift


def test_a_site_that_is_only_shifted_composes_as_scale_one():
    a = Intervention({}, {"x": np.array([1, 2], np.float32)})
    b = Intervention({"x": np.array([0.5, 0.5], np.float32)})
    assert (b @ a).shift["x"].tolist() == [0.5, 1]
    assert (a @ b).shift["x"].tolist() == [1, 2]
    assert (b @ a).scale["x"].tolist() == [0.5, 0.5]
    assert a.num_changed == 2


def test_composition_is_of_one_model_and_stays_so():
    ones = {"x": np.ones(2, np.float32)}
    a, b, other = (Intervention(ones, meta={"model": {"name": n, "fingerprint": n[0]}}) for n in ("m1", "m2", "other"))
    assert (b @ a).meta["model"]["fingerprint"] == "m"
    assert (Intervention(ones) @ a).meta["model"] == a.meta["model"]
    assert "model" not in (Intervention(ones) @ Intervention(ones)).meta
    with pytest.raises(InputError, match="got interventions of 'm1' and 'other'"):
        other @ a
    with pytest.raises(InputError, match="one model"):
        other @ (b @ a)


def test_maps_of_other_widths_do_not_compose():
    for width in (1, 2):  # one neuron would be every neuron's
        a, b = (Intervention({"x": np.ones(n, np.float32)}) for n in (width, 3))
        with pytest.raises(InputError, match=f"maps of one width at 'x', got {width} and 3 neurons"):
            b @ a


def test_model_without_a_fingerprint_composes_with_any_of_its_widths():
    ones = {"x": np.ones(2, np.float32)}
    named, whole = (Intervention(ones, meta={"model": {"name": "m", **more}}) for more in ({}, {"fingerprint": "f"}))
    assert (whole @ named).meta["model"] == (named @ whole).meta["model"] == whole.meta["model"]


def test_strength_that_maps_were_brought_to_is_told():
    a = example()
    assert a.at_strength(1.0).meta == a.meta
    half = a.at_strength(0.5).at_strength(0.5)
    assert half.meta["applied_strength"] == 0.25
    assert (a @ half).meta["composed"][1]["applied_strength"] == 0.25
    stated = Intervention(a.scale, a.shift, {**a.meta, "applied_strength": None})
    assert stated.at_strength(0.5).meta["applied_strength"] == 0.5


def test_digest_is_of_what_is_done_to_each_site():
    a = example()
    assert a.digest == Intervention(dict(reversed(a.scale.items())), a.shift, {"other": 1}).digest
    assert a.digest != example(1).digest
    assert a.digest != Intervention(a.scale, {}, a.meta).digest
    renamed = {s.replace("layers.2", "layers.3"): v for s, v in a.scale.items()}
    assert a.digest != Intervention(renamed, a.shift).digest
    assert a.identity(0.5)["strength"] == 0.5
    assert a.identity(0.5)["digest"] == a.digest


def test_strength_and_restriction():
    a = example()
    half = a.at_strength(0.5)
    for site in a.sites:
        scale, shift = a.map_of(site)
        np.testing.assert_allclose(half.scale[site], 1 + 0.5 * (scale - 1), rtol=1e-6)
        assert shift is None or np.allclose(half.shift[site], 0.5 * shift)
    assert a.at_strength(0).num_changed == 0
    assert a.restricted({"model.layers.0.mlp", "unknown"}).sites == ["model.layers.0.mlp"]
    assert a.restricted({"only.shifted"}).shift["only.shifted"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"method": "aura"}, "aura"),
        ({"composed": [{"method": "aura"}, {"composed": [{"method": "aura"}, {"method": "aura"}]}]}, "aura in 3 steps"),
        ({"composed": [{"method": "aura"}, {"method": "damp"}]}, "composed"),
        ({"composed": []}, "unknown"),
        ({"composed": ["not a description"]}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_what_was_fitted_layer_by_layer_is_called_by_its_method(meta, expected):
    assert method_of(meta) == expected
    assert Intervention({}, {}, meta).identity(1.0)["method"] == expected
