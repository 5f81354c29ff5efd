"""LoRA files that diffusers writes, on whole pipelines: from the same noise, the same latents as diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax import SanaControlNetPipeline, SanaPipeline, SanaSprintPipeline
from sana_jax.errors import UserError
from sana_jax.lora import lora_tree, read_lora
from sana_jax.pipelines.opening import abstract_params
from sana_jax.pipelines.sampling_function import make_sampling_fn
from sana_jax.weights.tables.sana import transformer_rules
from tests.lora import lora_oracle
from tests.parity import pipeline_oracle as oracle
from tests.parity.sana_oracle import relative_error
from tests.parity.test_pipelines import HEIGHT, LATENTS, SIZE, TEXT, WIDTH, run_theirs, their_noise

OURS = {"sprint": SanaSprintPipeline, "controlnet": SanaControlNetPipeline}
EVERYTHING = lora_oracle.ALL_LINEAR + lora_oracle.CONV
CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": lora_oracle.ATTENTION},
    "everything": {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERYTHING,
        "rank_pattern": {"attn1.to_q": 2, "^transformer_blocks.1.attn2.to_k": 7, "proj": 3},
        "alpha_pattern": {"attn1.to_q": 1, "to_v": 3, "transformer_blocks.2.ff.conv_inverted": 9},
    },
    "rank-stabilised": {"r": 9, "lora_alpha": 2, "use_rslora": True, "target_modules": lora_oracle.ATTENTION},
    "some blocks": {"r": 2, "lora_alpha": 2, "layers_to_transform": [1], "layers_pattern": "transformer_blocks"}
    | {"target_modules": lora_oracle.ATTENTION},
}


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> (their pipeline, ours read from the directory that theirs wrote)."""
    made = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            theirs = oracle.save(kind, directory)
            made[kind] = theirs, OURS.get(kind, SanaPipeline).from_pretrained(directory)
        return made[kind]

    return get


@pytest.fixture
def models(saved):
    """The same pipelines without a LoRA, whatever an earlier test has loaded."""

    def get(kind: str):
        theirs, ours = saved(kind)
        theirs.unload_lora_weights()
        ours.unload_lora_weights()
        return theirs, ours

    return get


@pytest.fixture(scope="module")
def lora_file(saved, tmp_path_factory):
    """(kind of pipeline, kind of LoRA, with metadata) -> its directory; made once."""
    made = {}

    def get(kind: str, config: str, metadata: bool = True, seed: int = 0):
        key = (kind, config, metadata, seed)
        if key not in made:
            pipeline = saved(kind)[0]
            pipeline.unload_lora_weights()
            directory = tmp_path_factory.mktemp("lora")
            made[key] = lora_oracle.make_lora(pipeline, directory, CONFIGS[config], seed, metadata)
        return made[key]

    return get


def arguments(kind: str) -> dict:
    shared = {**TEXT, **SIZE, "num_inference_steps": 2, "latents": oracle.noise(2, HEIGHT, WIDTH, 4)}
    if kind == "controlnet":
        shared["control_image"] = oracle.picture(100, 80)
    return shared


def their_latents(pipeline, kind: str) -> np.ndarray:
    extra = {"generator": torch.Generator().manual_seed(7)} if kind == "sprint" else {}
    return run_theirs(pipeline, "latent", **arguments(kind), **extra)


def our_latents(pipeline, kind: str) -> np.ndarray:
    extra = {"step_noise": their_noise(7, 2)} if kind == "sprint" else {}
    return pipeline(**arguments(kind), **extra, binning="off", output_type="latent").images


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("config", CONFIGS)
def test_beside_and_merged(models, lora_file, config, metadata):
    directory = lora_file("sana-1.0", config, metadata)
    theirs, ours = models("sana-1.0")
    without = our_latents(ours, "sana-1.0")
    theirs.load_lora_weights(directory)
    expected = their_latents(theirs, "sana-1.0")
    ours.load_lora_weights(directory)
    beside = our_latents(ours, "sana-1.0")
    ours.fuse_lora()
    merged = our_latents(ours, "sana-1.0")
    print(f"{relative_error(beside, expected):.2e} {relative_error(merged, expected):.2e}")
    assert relative_error(expected, without) > 0.01  # the LoRA does something
    assert relative_error(beside, expected) <= LATENTS
    assert relative_error(merged, expected) <= LATENTS
    ours.unload_lora_weights()
    np.testing.assert_array_equal(our_latents(ours, "sana-1.0"), without)


@pytest.mark.parametrize("kind", ["sprint", "controlnet"])
def test_other_pipelines(models, lora_file, kind):
    directory = lora_file(kind, "everything")
    theirs, ours = models(kind)
    without = our_latents(ours, kind)
    theirs.load_lora_weights(directory)
    expected = their_latents(theirs, kind)
    ours.load_lora_weights(directory)
    beside = our_latents(ours, kind)
    ours.unload_lora_weights()
    ours.load_lora_weights(directory, merge=True)
    assert relative_error(expected, without) > 0.01
    assert relative_error(beside, expected) <= LATENTS
    assert relative_error(our_latents(ours, kind), expected) <= LATENTS


def test_two_with_weights(models, lora_file):
    files = [lora_file("sana-1.0", "patterns"), lora_file("sana-1.0", "attention", seed=1)]
    theirs, ours = models("sana-1.0")
    for file, name in zip(files, "ab"):
        theirs.load_lora_weights(file, adapter_name=name)
    ours.load_lora_weights(files, ["a", "b"], weights=[0.7, -0.4])
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS
    programs = len(ours.programs)
    for weights in ([0.2, 1.5], [1.0, 1.0]):
        theirs.set_adapters(["a", "b"], weights)
        ours.set_adapters(["a", "b"], weights)
        assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS
    assert len(ours.programs) == programs  # other weights compile nothing
    ours.fuse_lora(0.5)
    theirs.set_adapters(["a", "b"], [0.5, 0.5])
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS
    ours.unfuse_lora()
    theirs.set_adapters("b")
    ours.set_adapters("b")
    assert ours.get_active_adapters() == ["b"]
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS


def test_merging_one_more_keeps_the_scale_of_those_merged_before(models, lora_file):
    files = [lora_file("sana-1.0", "patterns"), lora_file("sana-1.0", "attention", seed=1)]
    theirs, ours = models("sana-1.0")
    ours.load_lora_weights(files[0], "a")
    ours.fuse_lora(0.5)
    ours.load_lora_weights(files[1], "b", weights=0.7, merge=True)
    assert ours.describe_lora() == "pytorch_lora_weights.safetensors:0.5, pytorch_lora_weights.safetensors:0.7"
    for file, name in zip(files, "ab"):
        theirs.load_lora_weights(file, adapter_name=name)
    theirs.set_adapters(["a", "b"], [0.5, 0.7])
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS
    ours.unfuse_lora()  # the scale of merging goes with it
    theirs.set_adapters(["a", "b"], [1.0, 0.7])
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS


def test_weight_zero_is_the_base_to_the_bit(models, lora_file):
    _, ours = models("sana-1.0")
    without = our_latents(ours, "sana-1.0")
    file = lora_file("sana-1.0", "everything")
    ours.load_lora_weights(file, weights=0.0)
    np.testing.assert_array_equal(our_latents(ours, "sana-1.0"), without)
    ours.set_adapters("default_0", 1.0)
    assert relative_error(our_latents(ours, "sana-1.0"), without) > 0.01
    ours.fuse_lora(0.0)
    np.testing.assert_array_equal(our_latents(ours, "sana-1.0"), without)
    ours.unfuse_lora()
    ours.fuse_lora()
    assert relative_error(our_latents(ours, "sana-1.0"), without) > 0.01
    ours.unload_lora_weights()
    np.testing.assert_array_equal(our_latents(ours, "sana-1.0"), without)


def old_names(key: str, tensor: torch.Tensor) -> list:
    """PEFT's names as diffusers had them before PEFT."""
    if "attn" in key:
        stem, part = key.split(".lora_")
        stem, layer = stem.removesuffix(".0").rsplit(".", 1)
        return [(f"{stem}.processor.{layer}_lora.{'down' if part[0] == 'A' else 'up'}.weight", tensor)]
    return [(key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"), tensor)]


def kohya_names(key: str, tensor: torch.Tensor) -> list:
    """PEFT's names as kohya's scripts have them, with alpha 2 for every layer."""
    stem, part = key.removeprefix("transformer.").split(".lora_")
    stem = "lora_unet_" + stem.replace(".", "_")
    if part[0] == "B":
        return [(f"{stem}.lora_up.weight", tensor)]
    return [(f"{stem}.lora_down.weight", tensor), (f"{stem}.alpha", torch.tensor(2.0))]


def test_old_names(models, lora_file, tmp_path):
    """diffusers reads the names without the processor; ours are those and older ones."""
    peft = lora_file("sana-1.0", "everything", False)
    _, ours = models("sana-1.0")
    ours.load_lora_weights(peft)
    expected = our_latents(ours, "sana-1.0")
    ours.unload_lora_weights()
    ours.load_lora_weights(lora_oracle.rewrite(peft, tmp_path / "old", old_names))
    np.testing.assert_array_equal(our_latents(ours, "sana-1.0"), expected)


def test_kohya_names_and_alphas(models, lora_file, tmp_path):
    peft = lora_file("sana-1.0", "everything", False)  # of rank 4
    theirs, ours = models("sana-1.0")
    theirs.load_lora_weights(peft, adapter_name="quiet")
    theirs.set_adapters("quiet", 2 / 4)
    ours.load_lora_weights(lora_oracle.rewrite(peft, tmp_path / "kohya", kohya_names))
    assert relative_error(our_latents(ours, "sana-1.0"), their_latents(theirs, "sana-1.0")) <= LATENTS


def test_sampling_function(models, lora_file):
    """What training previews with a LoRA call."""
    _, ours = models("sana-1.0")
    file = lora_file("sana-1.0", "everything")
    noise, embeds = oracle.noise(2, HEIGHT, WIDTH), np.random.default_rng(1).standard_normal((2, 5, 24)).astype("f")
    prompts = {"prompt_embeds": embeds, "prompt_attention_mask": np.ones((2, 5), np.int32)}
    ours.load_lora_weights(file)
    options = {**SIZE, "num_inference_steps": 2, "guidance_scale": 1.0, "binning": "off", "output_type": "latent"}
    expected = ours(**prompts, **options, latents=noise).images.transpose(0, 2, 3, 1)
    abstract = abstract_params(ours.transformer)
    lora = lora_tree([(read_lora(file, transformer_rules(ours.transformer.config), abstract), 1.0)], abstract)
    sample = jax.jit(make_sampling_fn(ours.transformer, ours.sampler, 2, 1.0))
    inputs = [jnp.asarray(array) for array in (noise.transpose(0, 2, 3, 1), *prompts.values())]
    assert relative_error(sample(ours.params, *inputs, lora=lora), expected) <= LATENTS
    assert relative_error(sample(ours.params, *inputs), expected) > 0.01


def test_what_is_not_allowed(models, lora_file, tmp_path, capsys):
    _, ours = models("sana-1.0")
    file = lora_file("sana-1.0", "attention")
    with pytest.raises(UserError, match="no LoRA is loaded"):
        ours.fuse_lora()
    with pytest.raises(UserError, match="finite"):
        ours.load_lora_weights(file, weights=float("nan"))
    with pytest.raises(UserError, match="finite number for all or one each"):
        ours.load_lora_weights(file, weights=[1.0, 2.0])
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        ours.load_lora_weights([file, tmp_path / "absent"])
    with pytest.raises(UserError, match=r"path \[\] names no LoRA file"):
        ours.load_lora_weights([])
    assert ours.get_active_adapters() == []  # all or nothing
    ours.load_lora_weights(file, "style")
    assert "changes 18 layers in blocks 0 to 2, rank 4, scale 1" in capsys.readouterr().out
    assert "transformer_blocks.1.attn2.to_v" in ours.lora_table()
    assert ours.describe_lora() == "pytorch_lora_weights.safetensors:1"
    with pytest.raises(UserError, match="new name"):
        ours.load_lora_weights(file, "style")
    with pytest.raises(UserError, match=r"loaded are \['style'\]"):
        ours.set_adapters("other")
    with pytest.raises(UserError, match="would not be saved"):
        ours.save_pretrained(tmp_path / "out")
    ours.fuse_lora()
    for refused in (lambda: ours.set_adapters("style"), ours.fuse_lora, lambda: ours.load_lora_weights(file)):
        with pytest.raises(UserError, match="unfuse_lora"):
            refused()


def test_merged_weights_are_saved(models, lora_file, tmp_path):
    _, ours = models("sana-1.0")
    ours.load_lora_weights(lora_file("sana-1.0", "everything"), merge=True)
    expected = our_latents(ours, "sana-1.0")
    ours.save_pretrained(tmp_path / "merged")
    again = SanaPipeline.from_pretrained(tmp_path / "merged")
    assert relative_error(our_latents(again, "sana-1.0"), expected) <= 1e-6


def test_one_network_at_a_time(saved, lora_file, tmp_path):
    theirs, ours = saved("sana-1.0")
    theirs.unload_lora_weights()
    ours.unload_lora_weights()
    theirs.save_pretrained(tmp_path / "model")
    small = SanaPipeline.from_pretrained(tmp_path / "model", residency="one_at_a_time")
    file = lora_file("sana-1.0", "everything")
    for pipeline in (ours, small):
        pipeline.load_lora_weights(file, merge=True)
    expected = our_latents(ours, "sana-1.0")
    for _ in range(2):  # the second time the weights are read and merged again
        np.testing.assert_array_equal(our_latents(small, "sana-1.0"), expected)
        assert not small.transformer_weights.loaded
