"""Directories as they come: whichever way the weights lie in one, the logits are those of what transformers loads from
it; where it would load what is not read here, there is a ModelError with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit.errors import ModelError, VerificationError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.models.checkpoint import EMBEDDING, LM_HEAD
from fastsplit.tee.remote import RemoteModel

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from split import load_hf, make_model, relative_error, split

Weights = dict[str, torch.Tensor]

SMALL: dict[str, Any] = {"num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "attention_bias": True},
    "gemma2": {**SMALL, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24},
    "phi3": {**SMALL, "model_type": "phi3"},
    "mistral": {**SMALL, "model_type": "mistral"},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 16},
    "gemma3_text": {**SMALL, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 24},
    "granite": {**SMALL, "model_type": "granite", "tie_word_embeddings": True},
}
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22]])
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's model as transformers saves it; each is made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("saved")
            make_model(made[family], FAMILIES[family])
        return made[family]

    return make


def other(weights: Weights) -> Weights:
    """Of the same names and shapes, with numbers that nobody should read."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def save(directory: Path, weights: Weights, file: str = "model.safetensors") -> None:
    save_file({name: weight.clone() for name, weight in weights.items()}, directory / file, {"format": "pt"})


def save_index(directory: Path, weight_map: dict[str, str], file: str = "model.safetensors.index.json") -> None:
    (directory / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_shards(directory: Path, weights: Weights, *, listed: Callable[[str], bool] = lambda name: True) -> None:
    shards = [f"model-{index}-of-3.safetensors" for index in (1, 2, 3)]
    where = {name: shards[index % 3] for index, name in enumerate(weights)}
    for shard in shards:
        save(directory, {name: weight for name, weight in weights.items() if where[name] == shard}, shard)
    save_index(directory, {name: shard for name, shard in where.items() if listed(name)})


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    return {rename(name): weight for name, weight in weights.items()}


# ---- layouts ---------------------------------------------------------------------------------------------------------


def whole(directory: Path, weights: Weights) -> None:
    save(directory, weights)


def both(directory: Path, weights: Weights) -> None:
    save_shards(directory, other(weights))
    save(directory, weights)


def beside_a_broken_index(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    (directory / "model.safetensors.index.json").write_text("{")


def beside_other_formats(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    save(directory, other(weights), "model.fp16.safetensors")
    torch.save(other(weights), directory / "pytorch_model.bin")


def stale_shards(directory: Path, weights: Weights) -> None:
    save_shards(directory, weights)
    save(directory, other(weights), "model-1-of-2.safetensors")
    save(directory, other(weights), "model.safetensors.old")


def index_with_wrong_shards(directory: Path, weights: Weights) -> None:
    save_shards(directory, weights)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    save_index(directory, dict(zip(where, reversed(where.values()))))


def index_without_norms(directory: Path, weights: Weights) -> None:
    save_shards(directory, weights, listed=lambda name: "norm" not in name)


def twice_in_shards(directory: Path, weights: Weights) -> None:
    """Whatever the index says, the last file counts."""
    save(directory, other(weights), "a.safetensors")
    save(directory, weights, "b.safetensors")
    save_index(directory, {**dict.fromkeys(weights, "a.safetensors"), "nothing": "b.safetensors"})


def named_by_the_configuration(directory: Path, weights: Weights) -> None:
    save(directory, other(weights))
    save(directory, weights, "consolidated.safetensors")
    set_config(directory, transformers_weights="consolidated.safetensors")


def index_named_by_the_configuration(directory: Path, weights: Weights) -> None:
    save(directory, other(weights))
    save(directory, weights, "one.safetensors")
    save_index(directory, dict.fromkeys(weights, "one.safetensors"), "new.safetensors.index.json")
    set_config(directory, transformers_weights="new.safetensors.index.json")


def base_names(directory: Path, weights: Weights) -> None:
    save(directory, renamed(weights, lambda name: name.removeprefix("model.")))


def prefix_twice(directory: Path, weights: Weights) -> None:
    save_shards(directory, renamed(weights, lambda name: f"model.{name}"))


def more_than_there_is(directory: Path, weights: Weights) -> None:
    """What old files hold, what the model has no place for, and a layer that the configuration leaves out."""
    set_config(directory, num_hidden_layers=1)
    if "layer_types" in json.loads((directory / "config.json").read_text()):
        set_config(directory, layer_types=["full_attention"])
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.ones(1, dtype=torch.int32),
        "model.norm.weight_g": torch.ones(48),
        "model.language_model.model.norm.weight": torch.ones(48),
        "norm.bias": torch.ones(48),
        "score.weight": torch.ones(2, 48),
    }
    save(directory, {**weights, **more})


def in_several_dtypes(directory: Path, weights: Weights) -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.float16)
    save(directory, {name: weight.to(dtypes[index % 4]) for index, (name, weight) in enumerate(weights.items())})


ONE_EACH = (whole, base_names, prefix_twice)
LAYOUTS = (
    *ONE_EACH,
    both,
    beside_a_broken_index,
    beside_other_formats,
    stale_shards,
    index_with_wrong_shards,
    index_without_norms,
    twice_in_shards,
    named_by_the_configuration,
    index_named_by_the_configuration,
    more_than_there_is,
    in_several_dtypes,
)


def prepared(source: Path, directory: Path, layout: Callable[[Path, Weights], None]) -> Path:
    shutil.copy(source / "config.json", directory)
    layout(directory, load_file(source / "model.safetensors"))
    return directory


def check_logits(directory: Path, uri: str) -> None:
    with torch.inference_mode():
        expected = load_hf(directory)(IDS).logits
    with split(open_model(str(directory)), uri, plan="auto") as (runner, _), runner.new_cache() as cache:
        assert relative_error(runner.forward(IDS, cache, keep="all"), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("llama", layout) for layout in LAYOUTS),
        *(("gemma2", layout) for layout in LAYOUTS[3:]),
        *((family, layout) for family in FAMILIES if family != "llama" for layout in ONE_EACH),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.matrix(one_in=2)
def test_logits_are_those_of_what_transformers_loads(
    saved: Callable[[str], Path], tmp_path: Path, socket_dir: Path, family: str, layout: Callable[[Path, Weights], None]
) -> None:
    check_logits(prepared(saved(family), tmp_path, layout), f"unix://{socket_dir}/s")


# ---- the two that may be tied ----------------------------------------------------------------------------------------

HEADS: dict[str, tuple[bool, bool, bool]] = {
    "the embedding alone": (True, False, False),
    "the lm_head alone": (False, True, False),
    "both, equal": (True, True, True),
    "both, different": (True, True, False),
    "neither": (False, False, False),
}
"""Which are there: embedding, lm_head; whether they are equal."""

TIED: dict[str, Any] = {"tied": True, "untied": False, "left to the family": ...}
TIES = {"gemma2": True, "gemma3_text": True}
"""Families that are tied where config.json does not say anything."""

LM_HEAD_NAMES = ("lm_head.weight", "model.lm_head.weight", "model_lm_head.weight")
"""What transformers takes for the lm_head; of the last only as long as it takes any character for the prefix's dot."""


@pytest.mark.parametrize("lm_head_name", LM_HEAD_NAMES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix(one_in=8)
def test_tied_and_untied(
    saved: Callable[[str], Path],
    tmp_path: Path,
    socket_dir: Path,
    family: str,
    tied: str,
    heads: str,
    lm_head_name: str,
) -> None:
    embedding, lm_head, equal = HEADS[heads]

    def layout(directory: Path, weights: Weights) -> None:
        table = weights.pop(EMBEDDING)
        weights.pop(LM_HEAD, None)
        if embedding:
            weights[EMBEDDING] = table
        if lm_head:
            weights[lm_head_name] = table if equal else table.flip(0)
        save(directory, weights)
        set_config(directory, tie_word_embeddings=TIED[tied])

    directory = prepared(saved(family), tmp_path, layout)
    ties = TIES.get(family, False) if TIED[tied] is ... else TIED[tied]
    if (embedding and lm_head) or (ties and (embedding or lm_head)):
        check_logits(directory, f"unix://{socket_dir}/s")
        return
    missing = EMBEDDING if not embedding else LM_HEAD
    with pytest.raises(ModelError, match=f"weight '{missing}' missing in model.safetensors"):
        Executor(open_model(str(directory)))


def test_an_equal_lm_head_is_held_once(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def layout(directory: Path, weights: Weights) -> None:
        save(directory, {**weights, LM_HEAD: weights[EMBEDDING]})

    model = open_model(str(prepared(saved("gemma2"), tmp_path, layout)))
    assert LM_HEAD in dict(model.items())
    weights = Executor(model)._engine.weights
    assert weights.lm_head.weight.data_ptr() == weights.embedding.data_ptr()


# ---- the trusted copy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [both, twice_in_shards, base_names], ids=lambda layout: layout.__name__)
def test_the_trusted_copy_is_read_by_the_same_rules(
    saved: Callable[[str], Path],
    tmp_path: Path,
    socket_dir: Path,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    layout: Callable[[Path, Weights], None],
) -> None:
    """The executor serves the model as saved, the TEE side has it in another layout; and the other way round."""
    plain = open_model(str(saved("llama")))
    laid_out = open_model(str(prepared(saved("llama"), tmp_path, layout)))
    for index, (executor, trusted) in enumerate(((plain, laid_out), (laid_out, plain))):
        server = serve(f"unix://{socket_dir}/{index}", Executor(executor).handlers, arrays="torch")
        remote = RemoteModel.fetch(connect(server.uri, arrays="torch"), trusted)
        assert torch.equal(remote.weights["norms"], plain.tee_weights()["norms"])
    (tmp_path / "wrong").mkdir()
    wrong = open_model(
        str(prepared(saved("llama"), tmp_path / "wrong", lambda where, weights: save(where, other(weights))))
    )
    with pytest.raises(VerificationError, match="norm weights: 5 of 5 differ"):
        RemoteModel.fetch(connect(server.uri, arrays="torch"), wrong)


def test_a_norm_that_is_no_number_is_the_same_on_both_sides(
    saved: Callable[[str], Path],
    tmp_path: Path,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    socket_dir: Path,
) -> None:
    """It is the checkpoint's, so the executor is not blamed for it."""

    def layout(directory: Path, weights: Weights) -> None:
        weights["model.norm.weight"][3] = float("nan")
        save(directory, weights)

    model = open_model(str(prepared(saved("llama"), tmp_path, layout)))
    server = serve(f"unix://{socket_dir}/s", Executor(model).handlers, arrays="torch")
    remote = RemoteModel.fetch(connect(server.uri, arrays="torch"), model)
    assert int(remote.weights["norms"].isnan().sum()) == 1


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", {"": "flex_attention"}])
def test_how_a_configuration_wants_its_attention_computed_means_nothing(
    saved: Callable[[str], Path], tmp_path: Path, socket_dir: Path, attention: Any
) -> None:
    directory = prepared(saved("llama"), tmp_path, whole)
    handlers = Executor(open_model(str(directory))).handlers
    with torch.inference_mode():
        expected = load_hf(directory)(IDS).logits
    set_config(directory, _attn_implementation=attention)
    with (
        fastsplit.Server(f"unix://{socket_dir}/s", handlers, arrays="torch") as server,
        fastsplit.SplitModelForCausalLM.connect(server.uri, directory) as model,
    ):
        assert relative_error(model(IDS).logits, expected) < TOLERANCE


# ---- what is refused -------------------------------------------------------------------------------------------------


def without_a_layer(directory: Path, weights: Weights) -> None:
    set_config(directory, num_hidden_layers=3)
    save(directory, weights)


def two_of_one(directory: Path, weights: Weights) -> None:
    save(directory, {**weights, "norm.weight": weights["model.norm.weight"]})


def an_adapter(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def distributed(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    save(directory, weights, "shard-00000-model-00000-of-00001.safetensors")


def other_formats_alone(directory: Path, weights: Weights) -> None:
    torch.save(weights, directory / "pytorch_model.bin")


def a_variant_alone(directory: Path, weights: Weights) -> None:
    save(directory, weights, "model.fp16.safetensors")


def an_index_of_other_files(directory: Path, weights: Weights) -> None:
    save_index(directory, dict.fromkeys(weights, "pytorch_model.bin"))


def a_shard_that_is_not_there(directory: Path, weights: Weights) -> None:
    save_shards(directory, weights)
    (directory / "model-2-of-3.safetensors").unlink()


def a_shard_elsewhere(directory: Path, weights: Weights) -> None:
    save_index(directory, dict.fromkeys(weights, "../model.safetensors"))


def an_index_of_nothing(directory: Path, weights: Weights) -> None:
    save_index(directory, {})


def another_file_named(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    set_config(directory, transformers_weights="adapter_model.bin")


def a_file_named_elsewhere(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    set_config(directory, transformers_weights="../model.safetensors")


def layers_of_their_own(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    set_config(directory, per_layer_config={"1": {"intermediate_size": 40}})


def another_configuration(directory: Path, weights: Weights) -> None:
    save(directory, weights)
    set_config(directory, configuration_files=["config.json", "config.5.0.0.json"])


REFUSED: dict[Callable[[Path, Weights], None], str] = {
    without_a_layer: r"weight 'model\.layers\.2\..*' missing in model\.safetensors; transformers makes random numbers",
    two_of_one: r"'model\.norm\.weight' and 'norm\.weight' are both the weight 'model\.norm\.weight'",
    an_adapter: r"adapter_config\.json in it, an adapter",
    distributed: "shard-00000-model-00000-of-00001.safetensors in it, of a distributed checkpoint",
    other_formats_alone: r"neither model\.safetensors nor its index in it; pytorch_model\.bin, which is not read",
    a_variant_alone: r"neither model\.safetensors nor its index in it$",
    an_index_of_other_files: r"index\.json: weight '.*' in 'pytorch_model\.bin', expected a file of safetensors",
    a_shard_that_is_not_there: r"index\.json: it names 'model-2-of-3\.safetensors', which is not there",
    a_shard_elsewhere: r"index\.json: it names '\.\./model\.safetensors', expected a file in this directory",
    an_index_of_nothing: r"index\.json: no weight_map in it",
    another_file_named: r"config, transformers_weights: 'adapter_model\.bin'",
    a_file_named_elsewhere: r"it names '\.\./model\.safetensors', expected a file in this directory",
    layers_of_their_own: "config, per_layer_config",
    another_configuration: "config, configuration_files",
}


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.__name__)
def test_what_is_not_read_here_is_refused(
    saved: Callable[[str], Path], tmp_path: Path, layout: Callable[[Path, Weights], None]
) -> None:
    directory = prepared(saved("llama"), tmp_path, layout)
    with pytest.raises(ModelError, match=REFUSED[layout]):
        Executor(open_model(str(directory)))
