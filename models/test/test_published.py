"""Published checkpoints: whole and sharded files, rules from their names to ours, and what is wrong with some."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from vla_models.policy import CheckpointError  # noqa: E402
from vla_models.published import KEPT, Rule, TensorFiles, fill, find_checkpoint, load_published, translate  # noqa: E402


class Small(nn.Module):
    """An embedding, a layer, a buffer of whole numbers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


RULES = (
    Rule(r"model\.embed\.weight", "words.weight"),
    Rule(r"model\.head\.weight", "words.weight"),
    Rule(r"model\.h\.(\d+)\.(weight|bias)", r"layers.\1.\2", "never computed"),
    Rule(r"model\.steps", "steps"),
    Rule(r"optimizer\..*", None, "only for training"),
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(5, 4, generator=generator)
    out = {"model.embed.weight": words, "model.head.weight": words.clone(), "model.steps": torch.tensor(7)}
    for i in range(2):
        out |= {f"model.h.{i}.weight": torch.randn(4, 4, generator=generator), f"model.h.{i}.bias": torch.randn(4)}
    return out


def write_shards(folder, tensors, count: int = 2) -> list[str]:
    """A sharded checkpoint as transformers writes it; names of its files."""
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::count]}, folder / name)
    index = {"metadata": {}, "weight_map": {key: names[i % count] for i, key in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def filled(path) -> Small:
    network = Small()
    fill(network, TensorFiles(path), RULES)
    return network


def check(network, tensors) -> None:
    assert torch.equal(network.words.weight, tensors["model.embed.weight"].float())
    for i, layer in enumerate(network.layers):
        assert torch.equal(layer.weight, tensors[f"model.h.{i}.weight"].float())
    assert network.steps == 7


def test_a_whole_file_and_its_folder_are_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    check(filled(tmp_path), tensors)
    check(filled(tmp_path / "model.safetensors"), tensors)
    other = tmp_path / "diffusers"
    other.mkdir()
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    check(filled(other), tensors)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_are_read(tensors, tmp_path, count):
    write_shards(tmp_path, tensors, count)
    check(filled(tmp_path), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_become_ours(tensors, tmp_path, dtype):
    other = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(other, tmp_path / "model.safetensors")
    network = filled(tmp_path)
    check(network, other)
    assert network.words.weight.dtype == torch.float32


def test_a_missing_shard_is_named(tensors, tmp_path):
    names = write_shards(tmp_path, tensors)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"expected 2 files, found no '{names[1]}'"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "\ud800"])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"index.json: expected an index of shards"):
        TensorFiles(tmp_path)


def test_an_index_never_leads_out_of_the_folder(tensors, tmp_path):
    save_file(tensors, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="found no 'secret.safetensors'"):
        TensorFiles(folder)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.999))
def test_a_file_cut_short_is_named(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    save_file({"a": torch.zeros(100)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cut short or not a safetensors file"):
        TensorFiles(folder)


def test_a_pickle_is_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which is never read: convert it"):
        TensorFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TensorFiles(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or .* found none$"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.mystery": torch.zeros(1)}, "'model.mystery': unknown; no rule of the recipe explains it"),
        ({"model.h.0.bias": None}, "1 tensors missing, first 'layers.0.bias'"),
        ({"model.h.0.bias": torch.zeros(3)}, r"model.h.0.bias: expected shape \(4,\), found \(3,\)"),
        ({"model.h.0.bias": torch.zeros(1, 4)}, r"expected shape \(4,\), found \(1, 4\)"),
        ({"model.h.1.weight": torch.full((4, 4), float("nan"))}, "model.h.1.weight: holds numbers that are not finite"),
        ({"model.h.1.bias": torch.full((4,), float("inf")).bfloat16()}, "model.h.1.bias: holds numbers that are not"),
        ({"model.head.weight": torch.zeros(5, 4)}, "expected a copy of model.*, found another"),
    ],
)
def test_what_is_wrong_is_named(tensors, tmp_path, change, said):
    values = {name: value for name, value in (tensors | change).items() if value is not None}
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said) as caught:
        filled(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_numbers_that_are_not_finite_can_be_allowed(tensors, tmp_path):
    tensors["model.h.1.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    fill(Small(), TensorFiles(tmp_path), RULES, finite=False)


def test_one_of_two_tied_tensors_is_enough(tensors, tmp_path):
    for name in ("model.head.weight", "model.embed.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        check(filled(tmp_path), tensors)


def test_what_is_left_out_is_said(tensors, tmp_path):
    tensors |= {"optimizer.state": torch.zeros(1), "model.h.2.weight": torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    left = fill(Small(), TensorFiles(tmp_path), RULES)
    assert left == {"optimizer.state": "only for training", "model.h.2.weight": "never computed"}


def test_a_fused_tensor_is_cut(tmp_path):
    fused = torch.arange(24.0).reshape(12, 2)
    save_file({"qkv": fused}, tmp_path / "model.safetensors")
    network = nn.ModuleDict({name: nn.Linear(2, 4, bias=False) for name in "qkv"})
    rules = (Rule("qkv", ("q.weight", "k.weight", "v.weight"), change=lambda value: value + 1),)
    fill(network, TensorFiles(tmp_path), rules)
    assert torch.equal(torch.cat([network[name].weight for name in "qkv"]), fused + 1)
    save_file({"qkv": fused[:11].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"qkv: expected shape \(4, 2\), found \(3, 2\)"):
        fill(network, TensorFiles(tmp_path), rules)


def test_further_files_join_under_a_prefix(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "head.safetensors")
    files = TensorFiles(tmp_path)
    files.join("head.", tmp_path / "head.safetensors")
    files.alias("b", "head.a")
    assert files.shapes == {"a": (1,), "head.a": (1,), "b": (1,)}
    assert files["a"] == 0 and files["head.a"] == 1 and files["b"] == 1


def test_the_first_rule_that_matches_the_whole_name_counts():
    rules = (Rule(r"a\.(\w)", r"x.\1"), Rule(r"a\..+", r"y"))
    ours, left = translate(["a.b", "a.bc"], rules)
    assert {name: [key for key, _ in found] for name, found in ours.items()} == {"x.b": ["a.b"], "y": ["a.bc"]}
    assert not left
    with pytest.raises(CheckpointError, match="'ba.b': unknown"):
        translate(["ba.b"], rules)


def test_a_meta_network_checks_without_memory(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        network = Small()
    fill(network, TensorFiles(tmp_path), RULES)
    assert network.words.weight.is_meta


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not readable as JSON"), ("[1]", "expected settings, found list"), ("{}", "expected a type among"),
     ('{"type": "oracle"}', "expected a type among .*, found 'oracle'")],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config.json'?: .*{said}|config.json: {said}"):
        load_published(tmp_path)


def test_a_name_of_the_hub_is_downloaded_without_pickles(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("openvla/openvla-7b") == tmp_path
    assert asked == [("openvla/openvla-7b", list(KEPT))]
    assert find_checkpoint(tmp_path) == tmp_path and len(asked) == 1

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="no folder of that name, and the hub says: no network"):
        vla_models.load("openvla/openvla-7b")
