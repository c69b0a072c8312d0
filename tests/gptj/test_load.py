"""Loading: every layout people have, and a named file or tensor for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJForCausalLM

from finetune.config import ClmConfig, Config, Dtype, FullConfig, Init, ModelConfig
from finetune.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from finetune.errors import UserError
from finetune.gptj.load import Weights, build_model, weights_identity
from finetune.training.inputs import absent

CPU = torch.device("cpu")


def build(folder: Path, **changes):
    return build_model(
        ModelConfig(path=str(folder), dtype=Dtype.fp32, **changes), "lm", device=CPU, seed=0
    )


@pytest.fixture
def copy(small_gptj: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_gptj, tmp_path / "model"))


def same(folder: Path, reference: Path) -> bool:
    wanted = GPTJForCausalLM.from_pretrained(reference).state_dict()
    found = build(folder).state_dict()
    return wanted.keys() == found.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_safetensors(copy, small_gptj):
    assert same(copy, small_gptj)


def test_published_layout_with_legacy_buffers(copy, small_gptj):
    """One pytorch_model.bin in fp16's neighbour fp32, with the attention's old causal mask buffers."""
    state = load_file(copy / "model.safetensors")
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save(state, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert same(copy, small_gptj)


def test_sharded_pickles_in_fp16(copy):
    """pytorch_model.bin in two files with an index, as the fp16 branch of the published model has them."""
    state = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
    names = sorted(state)
    parts = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, copy / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (copy / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (copy / "model.safetensors").unlink()
    found = build(copy).state_dict()
    assert found.keys() == state.keys() - {"transformer.h.0.attn.bias"}
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in found.items())


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_as_torch_wrote_them_before_1_6(copy, small_gptj, shards):
    """They cannot be mapped. Of several files one is held at a time, also where the reading goes back and forth."""
    state = load_file(copy / "model.safetensors")
    names = sorted(state)
    parts = {f"pytorch_model-{i}.bin": names[i::shards] for i in range(shards)}
    if shards == 1:
        parts = {"pytorch_model.bin": names}
    for file, held in parts.items():
        torch.save(
            {name: state[name] for name in held}, copy / file, _use_new_zipfile_serialization=False
        )
    if shards > 1:
        weight_map = {name: file for file, held in parts.items() for name in held}
        (copy / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (copy / "model.safetensors").unlink()
    assert same(copy, small_gptj)
    weights = Weights(copy)
    assert weights.shape("transformer.wte.weight") == tuple(state["transformer.wte.weight"].shape)
    assert len(weights._open) == 1
    assert (
        all(torch.equal(weights[name], state[name]) for name in names) and len(weights._open) == 1
    )

    file = copy / next(reversed(parts))
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file.name}: cannot be read, truncated or corrupt" in refusal(copy)


def test_sharded_and_bare_body_names(copy, small_gptj):
    state = load_file(copy / "model.safetensors")
    names = sorted(state)
    first = {n.removeprefix("transformer."): state[n] for n in names[:5]}
    second = {n: state[n] for n in names[5:]}
    save_file(first, copy / "a.safetensors")
    save_file(second, copy / "b.safetensors")
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (copy / "model.safetensors").unlink()
    assert same(copy, small_gptj)


def test_casts_to_the_dtype_asked_for(copy):
    model = build_model(ModelConfig(path=str(copy), dtype=Dtype.bf16), "lm", device=CPU, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_random_reads_only_the_config_and_depends_on_the_seed_alone(copy):
    (copy / "model.safetensors").unlink()
    one, again = build(copy, init=Init.random), build(copy, init=Init.random)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    other = build_model(
        ModelConfig(path=str(copy), dtype=Dtype.fp32, init=Init.random), "lm", device=CPU, seed=1
    )
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def refusal(copy: Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        build(copy)
    return str(caught.value)


def test_missing_tensor_is_named(copy):
    state = load_file(copy / "model.safetensors")
    state.pop("transformer.h.1.mlp.fc_in.weight")
    save_file(state, copy / "model.safetensors")
    assert "missing: transformer.h.1.mlp.fc_in.weight" in refusal(copy)


def test_misshaped_and_extra_tensors_are_named(copy):
    state = load_file(copy / "model.safetensors")
    state["transformer.ln_f.weight"] = torch.ones(7)
    state["transformer.h.9.ln_1.weight"] = torch.ones(32)
    save_file(state, copy / "model.safetensors")
    with pytest.raises(UserError) as caught:
        build(copy)
    assert "transformer.h.9.ln_1.weight" in str(caught.value)
    assert "transformer.ln_f.weight is (7,), the config says (32,)" in str(caught.value)


def test_truncated_file_is_named(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors: cannot be read" in refusal(copy)


def test_index_may_not_leave_its_directory(copy):
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    names = load_file(copy.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its own directory" in refusal(copy)


class Planted:
    def __reduce__(self):
        return (open, (str(Path("/tmp/planted-by-a-pickle")), "w"))


def test_planted_pickle_is_refused_and_does_not_run(copy):
    target = Path("/tmp/planted-by-a-pickle")
    target.unlink(missing_ok=True)
    (copy / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Planted()}, copy / "pytorch_model.bin")
    assert "refused" in refusal(copy)
    assert not target.exists()


def test_not_a_gptj(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type is 'llama'" in refusal(copy)


def test_the_identity_of_weights_follows_every_file(copy):
    before = weights_identity(copy)
    assert before == weights_identity(copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    changed = weights_identity(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert len({before, changed, weights_identity(copy)}) == 3
    (copy / "README.md").write_text("a card")
    assert weights_identity(copy) == weights_identity(copy) != changed


def test_hub_id_offline_says_what_to_do():
    with pytest.raises(UserError) as caught:
        build_model(ModelConfig(path="EleutherAI/gpt-j-6b"), "lm", device=CPU, seed=0)
    assert "recipe=quickstart" in str(caught.value) and "model.path=DIR" in str(caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 24207819307\n" % (
    b"4d7a" * 16
)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "vocab.json",
        "shard.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_git_lfs_pointer_is_named_before_anything_is_read(copy, name):
    """Weights, sharded or not, config and tokenizer; a remedy that names the folder where there is a repository."""
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    if name.startswith("shard"):
        (copy / "model.safetensors").unlink()
        (copy / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"transformer.wte.weight": name}})
        )
    (copy / name).write_bytes(POINTER)
    (copy / ".git").mkdir()
    cfg = Config(
        task=ClmConfig(), adapter=FullConfig(), model=ModelConfig(path=str(copy), dtype=Dtype.fp32)
    )
    (problem,) = absent(cfg, download=False)
    assert str(problem) == (
        f"{copy / name}: this is a git-lfs pointer, not the file itself; its 22.55 GiB are still on the "
        f"server\n  git lfs install && git -C {copy} lfs pull"
    )
    with pytest.raises(UserError, match=r"git-lfs pointer"):
        load_tokenizer(str(copy)) if name in TOKENIZER_FILES else build(copy)


def test_pointers_that_nothing_reads_do_not_matter(copy, small_gptj):
    """As in a repository of which only the safetensors were pulled."""
    (copy / "pytorch_model.bin").write_bytes(POINTER)
    (copy / "flax_model.msgpack").write_bytes(POINTER)
    assert same(copy, small_gptj)
    (copy / "model.safetensors").write_bytes(POINTER)
    cfg = Config(
        task=ClmConfig(),
        adapter=FullConfig(),
        model=ModelConfig(path=str(copy), dtype=Dtype.fp32, init=Init.random),
    )
    assert not list(absent(cfg, download=False))
