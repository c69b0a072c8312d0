"""Converted checkpoints: the same bits, the same logits, and not more memory than a tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM

from finetune.cli.app import compose_config
from finetune.cli.convert import run
from finetune.errors import RunFailed, UserError
from tests.export import mesh_reference

LAYERS, WIDTH, VOCABULARY, HEADS, ROTARY, CORES = 11, 32, 96, 4, 4, 4
IDS = [3, 17, 95, 0, 41, 60, 5]
HEAD_WORDS = [f"n_head={HEADS}", f"rotary_dim={ROTARY}"]


def convert(source: Path, target: Path, *words: str) -> Path:
    assert run(compose_config([f"source={source}", f"target={target}", *words], "convert")) == 0
    return target


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t):
        return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)

    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.fixture(scope="module")
def states():
    return mesh_reference.random_state(np.random.default_rng(0), LAYERS, WIDTH, VOCABULARY, CORES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A GPT-J in Hugging Face's form with signed zeros among its biases."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = GPTJForCausalLM(
        GPTJConfig(n_embd=WIDTH, n_layer=3, n_head=HEADS, rotary_dim=ROTARY, vocab_size=VOCABULARY)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
                parameter[::3] = -0.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("optimizer", [False, True], ids=["slim", "full"])
def test_a_mesh_checkpoint_gives_the_logits_of_the_original_arithmetic(states, tmp_path, optimizer):
    """The judge computes in numpy with every core's own shard. 11 layers: layer_10 sorts before layer_2."""
    mesh_reference.save(states, tmp_path / "mesh", optimizer=optimizer)
    (tmp_path / "config.json").write_text(json.dumps({"n_heads": HEADS, "pe_rotary_dims": ROTARY}))
    target = convert(tmp_path / "mesh", tmp_path / "hf", f"config={tmp_path / 'config.json'}")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0].numpy()
    wanted = mesh_reference.forward(states, IDS, HEADS, ROTARY)
    assert np.abs(wanted).max() > 1
    # Sums over cores were rounded to fp32 once; the rest is exact.
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shards", [1, 4])
def test_to_mesh_and_back_is_the_same_bit_by_bit(tiny, tmp_path, dtype, shards):
    start = convert(tiny, tmp_path / "start", f"dtype={dtype}")
    mesh = convert(start, tmp_path / "mesh", "to=jax", f"shards={shards}", "step=123")
    back = convert(mesh, tmp_path / "back", *HEAD_WORDS)
    assert same_bits(all_tensors(start), all_tensors(back))
    again = convert(back, tmp_path / "again", "to=jax", f"shards={shards}", "step=123")
    for file in sorted(mesh.rglob("*.npz")):
        a, b = np.load(file), np.load(again / file.relative_to(mesh))
        assert a.files == b.files
        assert all(a[k].tobytes() == b[k].tobytes() and a[k].dtype == b[k].dtype for k in a.files)
    assert len(list(mesh.rglob("*.npz"))) == 16 * shards


def test_what_we_write_is_what_the_original_would_read(tiny, tmp_path):
    """The written leaves, put back into a pytree by the reference, compute Hugging Face's logits."""
    mesh = convert(tiny, tmp_path / "mesh", "to=jax", "shards=4")
    shapes = mesh_reference.random_state(np.random.default_rng(1), 3, WIDTH, VOCABULARY, CORES)
    states = []
    for core, state in enumerate(shapes):
        leaves = [
            a[k]
            for i in range(16)
            for a in [np.load(mesh / f"shard_{core}/{i}.npz")]
            for k in a.files
        ]
        wanted = mesh_reference.flatten(state)
        assert [np.shape(leaf) for leaf in leaves] == [np.shape(leaf) for leaf in wanted]
        values = iter(leaves)
        params = {
            k: {n: next(values) for n in sorted(v)} for k, v in sorted(state["params"].items())
        }
        states.append({"params": params, "step": next(values)})
    model = GPTJForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(
        mesh_reference.forward(states, IDS, HEADS, ROTARY), wanted, atol=1e-9
    )


def test_bfloat16_arrays_have_the_type_that_numpy_gives_jax_arrays(tiny, tmp_path):
    mesh = convert(tiny, tmp_path / "mesh", "to=jax", "dtype=bf16", "shards=2")
    assert np.load(mesh / "shard_0/0.npz")["arr_0"].dtype == np.dtype("V2")


@pytest.mark.parametrize("form", ["one .bin", "two .bin", "body only"])
def test_published_forms_become_sharded_safetensors(tiny, tmp_path, form):
    """One pytorch_model.bin with legacy buffers, an index over two, names of the bare body."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tiny / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    stored = tensors | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
    stored |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e9) for i in range(3)}
    if form == "one .bin":
        torch.save(stored, source / "pytorch_model.bin")
    elif form == "two .bin":
        halves = [dict(list(stored.items())[::2]), dict(list(stored.items())[1::2])]
        for i, half in enumerate(halves):
            torch.save(half, source / f"part{i}.bin")
        index = {"weight_map": {k: f"part{i}.bin" for i, half in enumerate(halves) for k in half}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        save_file(
            {k.removeprefix("transformer."): v for k, v in tensors.items()},
            source / "model.safetensors",
        )
    target = convert(source, tmp_path / "target", "dtype=bf16", "max_shard_gib=0.00002")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    assert same_bits(all_tensors(target), {k: v.to(torch.bfloat16) for k, v in tensors.items()})
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    model, told = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert (
        model.dtype == torch.bfloat16 and not told["missing_keys"] and not told["unexpected_keys"]
    )
    assert len(AutoTokenizer.from_pretrained(target)) == 50400


def test_an_export_in_another_precision_says_so(tiny, tmp_path):
    """And leaves the card behind, which tells the files and the proof of the export it came from."""
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    (source / "finetune.json").write_text(json.dumps({"head": "lm", "dtype": "fp32", "base": "x"}))
    (source / "README.md").write_text("in fp32, SHA-256 ...")
    target = convert(source, tmp_path / "target", "dtype=bf16")
    assert json.loads((target / "finetune.json").read_text()) == {
        "head": "lm",
        "dtype": "bf16",
        "base": "x",
    }
    assert not (target / "README.md").exists()


def test_wrong_use_is_explained(tiny, states, tmp_path):
    mesh_reference.save(states, tmp_path / "mesh")
    cases = [
        (tmp_path / "mesh", [], "number of heads"),
        (tmp_path / "nowhere", [], "no directory"),
        (tiny, ["to=tpu"], "to = tpu"),
        (tiny, ["to=jax", "shards=3"], "shards = 3"),
    ]
    for source, words, message in cases:
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "out", *words)
    (tmp_path / "mesh/shard_2/5.npz").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"5\.npz"):
        convert(tmp_path / "mesh", tmp_path / "out", *HEAD_WORDS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="not empty"):
        convert(tiny, tmp_path / "full")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_an_adapter_is_told_which_command_merges_it(tiny, tmp_path):
    run_dir = tmp_path / "lr=1 (a)"
    (run_dir / "export").mkdir(parents=True)
    (run_dir / "export/adapter_config.json").write_text("{}")
    (run_dir / "config.yaml").touch()
    with pytest.raises(UserError, match="this is an adapter") as caught:
        convert(run_dir / "export", tmp_path / "target")
    assert f"python launch/export.py \"run='{run_dir}'\" kind=merged" in caught.value.remedy


def test_fp16_never_makes_infinities(tiny, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tiny / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    tensors["lm_head.bias"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(RunFailed, match=r"lm_head\.bias"):
        convert(source, tmp_path / "out", "dtype=fp16")
