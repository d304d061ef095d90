"""`--modules` leaves out what a word with `!` in front matches, in every verb, so that errors can be followed."""

import re
import shlex

import pytest

import aura_dist
from aura_dist.cli import main
from aura_dist.config.settings import default_of
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import ConfigError, ModelError
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from aura_dist.sites.kinds import DEFAULT, except_for
from tests.models import TINY_CONFIGS, save_tiny


@pytest.fixture(scope="module")
def llama():
    return find_sites(skeleton(TINY_CONFIGS["llama"]()))


CHOICES = {
    "a pattern of a kind": (["mlp", "!*.up_proj"], lambda n: ".mlp." in n and "up_proj" not in n),
    "the order does not count": (["!*.up_proj", "mlp"], lambda n: ".mlp." in n and "up_proj" not in n),
    "a kind of all": (["*", "!norm"], lambda n: "norm" not in n),
    "a kind of an alias": (["all", "!attention"], lambda n: ".mlp." in n),
    "several": (["all", "!*.0.*", "!*.1.mlp.*"], lambda n: "norm" not in n and ".0." not in n and ".1.mlp." not in n),
    "one layer of a pattern": (["*.mlp.*", "!model.layers.1.*"], lambda n: ".mlp." in n and ".1." not in n),
    "of the default alone": (["!*.0.*"], lambda n: ".mlp." in n and ".0." not in n),
    "an alias of everything": (["*", "!all"], lambda n: "norm" in n),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_left(case, llama):
    words, wanted = CHOICES[case]
    chosen, names = ([s.name for s in sites if s.kind in OUTPUTS] for sites in (llama.select(words), llama.sites))
    assert chosen == [name for name in names if wanted(name)]


OUTPUTS = ("attention", "mlp", "norm")
BOTH_SIDES = {
    "a pattern means outputs": (["*.mlp.*"], {"mlp"}),
    "everything that comes out": (["*"], {"attention", "mlp", "norm", "residual"}),
    "inputs are named": (["*:input"], {"neurons", "heads", "inputs"}),
    "inputs of one module": (["*.down_proj:input"], {"neurons"}),
    "a pattern of the layers": (["*.layers.?"], {"residual"}),
    "both": (["neurons", "*.mlp.*"], {"neurons", "mlp"}),
    "what is left out is left out on both sides": (["heads", "neurons", "!*.mlp.*"], {"heads"}),
    "but a module's own name is its output": (["mlp", "neurons", "!*.*_proj"], {"neurons"}),
    "alone": (["!*:input", "!*_proj"], set()),
}


@pytest.mark.parametrize("case", BOTH_SIDES)
def test_inputs_and_outputs(case, llama):
    words, kinds = BOTH_SIDES[case]
    if not kinds:
        with pytest.raises(ConfigError, match="expected a pattern of chosen modules"):
            llama.select(words)
    else:
        assert {s.kind for s in llama.select(words)} == kinds


@pytest.mark.parametrize("word", ["*.down_proj*", "*proj*", "model.layers.1.mlp.*_proj*"])
def test_pattern_that_may_mean_either_is_refused(word, llama):
    stem = re.escape(word.removesuffix("*"))
    both = f"got one that matches both; write '{stem}' for the outputs, or '{stem}:input' for the inputs"
    with pytest.raises(ConfigError, match=both):
        llama.select([word])
    assert llama.select([word.removesuffix("*")])
    assert llama.select([word.removesuffix("*") + ":input"])
    assert llama.select(["mlp", "neurons", "attention", f"!{word}", "norm"]), "leaving both out is plain"


REFUSED = {
    "matches nothing": (["mlp", "!*.mamba.*"], r"--modules '!\*\.mamba\.\*' matches nothing in Llama"),
    "was not chosen": (
        ["attention", "!*.mlp.*"],
        r"'!\*\.mlp\.\*': expected a pattern of chosen modules, got one of others",
    ),
    "leaves nothing": (["mlp", "!all"], "'!all': expected a module to be left, got none of 9; leave out fewer"),
    "together leave nothing": (["mlp", "!*.[01].*", "!*.2.*"], "expected a module to be left, got none of 9"),
    "no pattern": (["mlp", "!"], "--modules '!' matches nothing"),
    "twice": (["mlp", "!!norm"], "--modules '!!norm' matches nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_left_out(case, llama):
    words, message = REFUSED[case]
    with pytest.raises((ConfigError, ModelError), match=message):
        llama.select(words)


def test_default_is_that_of_the_setting():
    assert default_of(CollectConfig.__dataclass_fields__["modules"]) == [DEFAULT]


def test_layers_are_named_together():
    names = ["model.layers.0.mamba.x_proj", "model.layers.11.mamba.x_proj", "h.2"]
    assert shlex.split(except_for(names)) == ["!model.layers.*.mamba.x_proj", "!h.2"]


def test_advice_leaves_out_no_module_of_another_layer_that_is_called():
    called = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.0.w1"]
    assert shlex.split(except_for(["model.layers.2.mlp.up_proj"], called)) == ["!model.layers.2.mlp.up_proj"]
    assert shlex.split(except_for(["model.layers.2.mlp.down_proj"], called)) == ["!model.layers.*.mlp.down_proj"]
    chosen_by_a_router = except_for(["model.layers.1.mlp.experts.3.w1"], called)
    assert shlex.split(chosen_by_a_router) == ["!model.layers.*.mlp.experts.*.w1"]


@pytest.fixture(scope="module")
def collected(tmp_path_factory, sentences_csv, tiny_dir):
    """A scored store of Llama's attention and MLPs."""
    store = tmp_path_factory.mktemp("left-out") / "s.zarr"
    flags = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "20", "--num-negative", "20"]
    command = ["collect", "--model", str(tiny_dir("llama")), *flags, "--store", str(store), "--modules", "all"]
    assert main([*command, "!*.down_proj", "!*.0.self_attn.*"]) == 0
    assert main(["score", "--store", str(store), "--statistics", "auroc"]) == 0
    return store


def test_fit_leaves_out_modules_of_the_store(collected, tmp_path, refused):
    sites = list(aura_dist.open_store(collected)["activations"].children)
    assert not any("down_proj" in s or ".0.self_attn." in s for s in sites)
    fit = ["fit", "--store", str(collected), "--concept", "toxic", "--out", str(tmp_path / "aura"), "--modules"]
    assert main([*fit, "!*.up_proj"]) == 0
    assert list(aura_dist.Intervention.load(tmp_path / "aura").scale) == [s for s in sites if "up_proj" not in s]
    refused([*fit, "!*.down_proj"], r"--modules '!\*\.down_proj' matches none of the 14 modules of the store")
    refused([*fit, "!*"], "expected a module to be left, got none of 14")
    by_api = aura_dist.fit(collected, "toxic", modules=["mlp", "!*.1.*"])
    assert list(by_api.scale) == [s for s in sites if ".mlp." in s and ".1." not in s]


def test_plan_and_a_continued_store_know_them_too(collected, tiny_dir, refused, capsys):
    plan = ["plan", "--model", str(tiny_dir("llama")), "--num-positive", "4", "--num-negative", "4", "--modules", "mlp"]
    assert main([*plan, "!*.2.*"]) == 0
    assert re.search(r"captured +6 modules", capsys.readouterr().out)
    refused([*plan, "!*.mamba.*"], "matches nothing")


def test_advice_to_leave_modules_out_can_be_followed(sentences_csv, tmp_path, capsys):
    """Jamba's state-space layers do without some of their linear layers' forwards."""
    model = save_tiny("jamba", tmp_path / "model")
    flags = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "6", "--num-negative", "6"]
    command = ["collect", "--model", str(model), *flags, "--store", str(tmp_path / "s.zarr"), "--modules", "mlp"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    advice = re.search(r"were not called in the forward pass .*; leave them out: --modules … (.*)$", error)
    assert advice, error
    assert main([*command, *shlex.split(advice[1]), "--overwrite"]) == 0, capsys.readouterr().err
    sites = list(aura_dist.open_store(tmp_path / "s.zarr")["activations"].children)
    assert any("feed_forward" in site for site in sites), "only what was not called is left out"
