"""Every keyword that transformers documents for `generate` and for `forward`: HF's own tokens, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from split import load_hf, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerFast, WatermarkingConfig, set_seed
from transformers.generation import CompileConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import TransformersKwargs

import fastsplit
from fastsplit import SplitModelForCausalLM
from fastsplit.errors import SettingError
from fastsplit.executor.service import Executor
from fastsplit.hf.refused import UNSUPPORTED
from fastsplit.models import open_model

SHAPE = {"vocab_size": 260, "num_hidden_layers": 2}
IDS = torch.tensor([[66, 17, 3, 88, 41, 9, 60, 22]])
PADDED = torch.tensor([[0, 0, 5, 7, 66, 3], [9, 8, 17, 66, 5, 4]])
MASK = (PADDED != 0).long()
ONCE = {"return_dict_in_generate": True}
STEPS = 8


def stop_string(model: Any) -> str:
    """A character that the model generates, not as its first."""
    text = make_tokenizer().decode(model.generate(IDS, max_new_tokens=STEPS, pad_token_id=0, do_sample=False)[0, 9:])
    return next(char for char in text if char != "\ufffd")


def make_tokenizer(first: int = 0) -> PreTrainedTokenizerFast:
    """Of single bytes, whose ids begin at `first` + 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, **{char: first + index + 1 for index, char in enumerate(alphabet)}}
    vocab.update({f"<{index}>": index for index in range(1, first + 1)})
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<unk>", "eos_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keywords") / "model"
    make_model(path, SHAPE)
    return path


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return load_hf(directory)


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastsplit.Server]:
    handlers = Executor(open_model(str(directory))).handlers
    with fastsplit.Server(f"unix://{tmp_path_factory.mktemp('uri')}/s", handlers, arrays="torch") as server:
        yield server


@pytest.fixture
def ours(server: fastsplit.Server, directory: Path) -> Iterator[SplitModelForCausalLM]:
    with SplitModelForCausalLM.connect(server.uri, directory) as model:
        yield model


@pytest.fixture(scope="module")
def helper(directory: Path) -> Any:
    """The same weights with some noise: as an assistant it is often right, and often wrong."""
    model = load_hf(directory)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.generation_config.num_assistant_tokens = 3
    return model


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with another tokenizer."""
    path = tmp_path_factory.mktemp("stranger")
    make_model(path, {**SHAPE, "vocab_size": 264}, seed=4)
    return load_hf(path)


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


def even(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)


def after_10(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.full((len(input_ids),), input_ids.shape[1] >= 10)


def decode_by_hand(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
    """What a caller's own decoding loop looks like: `custom_generate`."""
    for _ in range(3):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.topk(2).indices[:, 1:]], dim=1)
    return input_ids


def continued(model: Any) -> dict[str, Any]:
    """The cache of the first tokens of the prompt."""
    return {"past_key_values": model(IDS[:, :5]).past_key_values}


SAMPLED = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 3}
BATCH = {"inputs": PADDED, "attention_mask": MASK}
LOOKUP = {"inputs": IDS.repeat(1, 3), "prompt_lookup_num_tokens": 4}
FIRST_TOKENS = list(range(3, 40))
SAME: dict[str, dict[str, Any] | Callable[[Any], dict[str, Any]]] = {
    # generate's own
    "inputs": {"inputs": IDS},
    "generation_config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5)},
    "logits_processor": {"logits_processor": [even]},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([after_10])},  # type: ignore[list-item]
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 7, 11, 66], **BEAMS},
    "synced_gpus": {"synced_gpus": False},
    "assistant_model": {"assistant_model": "helper"},
    "streamer": {"streamer": "streamer"},
    "negative_prompt_ids": {"negative_prompt_ids": IDS[:, :4], "guidance_scale": 1.5},
    "negative_prompt_attention_mask": {
        "negative_prompt_ids": IDS[:, :4],
        "negative_prompt_attention_mask": torch.tensor([[0, 1, 1, 1]]),
        "guidance_scale": 1.5,
    },
    "tokenizer": {"tokenizer": "tokenizer"},
    "assistant_tokenizer": {
        "assistant_model": "stranger",
        "tokenizer": "tokenizer",
        "assistant_tokenizer": "another tokenizer",
    },
    "trust_remote_code": {"trust_remote_code": True},
    # length
    "max_length": {"max_length": 11, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 12, "eos_token_id": FIRST_TOKENS},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": FIRST_TOKENS},
    "early_stopping": {"early_stopping": True, "eos_token_id": FIRST_TOKENS, **BEAMS},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": ["what comes"], "tokenizer": "tokenizer"},
    # strategy
    "do_sample": {"do_sample": True},
    "num_beams": BEAMS,
    # cache
    "use_cache": {"use_cache": False},
    "cache_config": {"cache_config": {"nbits": 4}},
    "max_cache_len": {"max_cache_len": 64},
    # logits
    "temperature": {**SAMPLED, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {**SAMPLED, "top_p": 0.6},
    "min_p": {**SAMPLED, "min_p": 0.1},
    "top_h": {**SAMPLED, "top_h": 0.5},
    "typical_p": {**SAMPLED, "typical_p": 0.6},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.01},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.01},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "length_penalty": {"length_penalty": -2.0, "eos_token_id": FIRST_TOKENS, **BEAMS},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8]]},
    "renormalize_logits": {"renormalize_logits": True, **BEAMS},
    "forced_bos_token_id": {"inputs": IDS[:, :1], "forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": [4]},
    "suppress_tokens": {"suppress_tokens": FIRST_TOKENS},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(200))},
    "sequence_bias": {"sequence_bias": [[[66], 5.0]]},
    "token_healing": {"token_healing": True, "tokenizer": "tokenizer"},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    # output
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "output_scores": {**ONCE, "output_scores": True},
    "output_logits": {**ONCE, "output_logits": True},
    "return_dict_in_generate": ONCE,
    # special tokens
    "pad_token_id": {"inputs": PADDED, "pad_token_id": 0},
    "bos_token_id": {"inputs": None, "bos_token_id": 9},
    "eos_token_id": {"eos_token_id": FIRST_TOKENS, **BATCH},
    # of encoders
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    # assistants
    "is_assistant": {**ONCE, "is_assistant": True, "output_scores": True},
    "num_assistant_tokens": {"assistant_model": "helper", "num_assistant_tokens": 2},
    "num_assistant_tokens_schedule": {"assistant_model": "helper", "num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_model": "helper", "assistant_confidence_threshold": 0.9},
    "prompt_lookup_num_tokens": LOOKUP,
    "max_matching_ngram_size": {**LOOKUP, "max_matching_ngram_size": 3},
    "assistant_lookbehind": {"assistant_model": "helper", "assistant_lookbehind": 3},
    "target_lookbehind": {"assistant_model": "helper", "target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_model": "helper", "assistant_ensemble_weight": 0.5},
    # performance
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "prefill_chunk_size": {"prefill_chunk_size": 3, **BATCH},
    "continuous_batching_config": {"continuous_batching_config": None},
    "low_memory": {"low_memory": True},
    # forward's
    "input_ids": {"inputs": None, "input_ids": IDS},
    "attention_mask": BATCH,
    "position_ids": {"position_ids": torch.arange(3, 11)[None]},
    "past_key_values": continued,
    "labels": {"labels": IDS},
    "logits_to_keep": {"logits_to_keep": 2},
    "output_router_logits": {"output_router_logits": True},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(1)},
}
"""By keyword: a call in which it makes a difference where it can, and in which HF's tokens are expected."""
REFUSED: dict[str, Any] = {
    "inputs_embeds": torch.zeros(1, 2, 48),
    "output_attentions": True,
    "output_hidden_states": True,
    "is_causal": False,
    "cu_seq_lens_q": torch.tensor([0, 8]),
    "cu_seq_lens_k": torch.tensor([0, 8]),
    "max_length_q": 8,
    "max_length_k": 8,
    "seq_idx": torch.zeros(1, 8, dtype=torch.int32),
    "cache_implementation": "static",
    "custom_generate": "transformers-community/dola",
    "assistant_early_exit": 1,
    "use_mtp": True,
    "speculation_type": "dflash",
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [],
    "force_words_ids": [[5]],
}
SETTINGS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
FORWARD = {*inspect.signature(SplitModelForCausalLM.forward).parameters, *TransformersKwargs.__optional_keys__}


def test_each_keyword_is_in_one_of_the_two_tables() -> None:
    """A keyword that a new version of transformers brings fails this, until it gives HF's tokens or is refused."""
    own = {*inspect.signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"}
    documented = (own | SETTINGS | FORWARD | {"trust_remote_code"}) - {"self", "kwargs"}
    assert documented - set(SAME) - set(REFUSED) == set()
    assert set(SAME) & set(REFUSED) == set()
    assert set(REFUSED) == set(UNSUPPORTED)


def tokens(result: Any) -> list[list[int]]:
    return getattr(result, "sequences", result).tolist()


@pytest.fixture(scope="module")
def generate(helper: Any, stranger: Any, reference: Any) -> Callable[..., list[list[int]]]:
    """Generates with a keyword's settings: given in the call, or those that can be as the model's own."""
    tokenizer = make_tokenizer()
    stop = stop_string(reference)

    def run(model: Any, name: str, as_models: bool = False) -> list[list[int]]:
        found = SAME[name]
        streamer = Streamer()
        stand_ins = {
            "helper": helper,
            "stranger": copy.deepcopy(stranger),
            "tokenizer": tokenizer,
            "another tokenizer": make_tokenizer(first=3),
            "streamer": streamer,
        }
        given: dict[str, Any] = dict(found(model) if callable(found) else found)
        given = {key: stand_ins.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
        if name == "stop_strings":
            given["stop_strings"] = ["never", stop]
        settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
        if "generation_config" not in given:
            given = {**settings, **given}
        call = {"inputs": IDS, **given}
        before = model.generation_config
        if as_models:
            model.generation_config = GenerationConfig(**{key: given[key] for key in given if key in SETTINGS})
            call = {key: value for key, value in call.items() if key not in SETTINGS}
        set_seed(11)
        helper.generation_config.num_assistant_tokens = 3  # it learns
        try:
            result = tokens(model.generate(**call))
        finally:
            model.generation_config = before
        return [*result, streamer.seen]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.matrix(one_in=6, each=False)
@pytest.mark.parametrize("name", SAME)
def test_tokens_are_hf(
    ours: SplitModelForCausalLM, reference: Any, generate: Callable[..., list[list[int]]], name: str
) -> None:
    assert generate(ours, name) == generate(reference, name)
    if name in SETTINGS:
        assert generate(ours, name, as_models=True) == generate(reference, name, as_models=True)


@pytest.mark.parametrize(
    "extra",
    [
        {"stop_strings": "x", **BEAMS},
        {"assistant_model": "helper", **BEAMS},
        {"assistant_model": "helper", "do_sample": True, "temperature": 0.7},
        {"guidance_scale": 1.5, "use_cache": False},
        {"guidance_scale": 1.5, **BATCH},
        {"guidance_scale": 1.5, **BEAMS},
        {"custom_generate": decode_by_hand},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "hybrid"},
        {"num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "output_attentions": False},
    ],
    ids=lambda extra: ", ".join(f"{key}" for key in extra),
)
@pytest.mark.filterwarnings("ignore")
def test_tokens_are_hf_together(
    ours: SplitModelForCausalLM, reference: Any, helper: Any, stranger: Any, extra: dict[str, Any]
) -> None:
    found = []
    for model in (ours, reference):
        set_seed(5)
        helper.generation_config.num_assistant_tokens = 3
        stand_ins = {
            "helper": helper,
            "stranger": copy.deepcopy(stranger),  # transformers prunes its head
            "another tokenizer": make_tokenizer(first=3),
        }
        options = {"inputs": IDS, "max_new_tokens": STEPS, "pad_token_id": 0, **extra}
        if "custom_generate" not in extra:
            options["tokenizer"] = make_tokenizer()
        options = {
            key: stand_ins.get(value, value) if isinstance(value, str) else value for key, value in options.items()
        }
        found.append(tokens(model.generate(**options)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name_wherever_it_is_said(ours: SplitModelForCausalLM, name: str) -> None:
    said = {name: REFUSED[name]}
    calls = ours.channel.stats.calls
    with pytest.raises(SettingError, match=rf"{name}: .*not supported by a split model, w"):
        ours.generate(IDS, max_new_tokens=2, **said)
    if name in FORWARD:
        with pytest.raises(SettingError, match=rf"{name}: .*not supported by a split model, w"):
            ours(IDS, **said)
    if name in SETTINGS:
        with pytest.raises(SettingError, match=f"{name}: "):
            ours.generate(IDS, generation_config=GenerationConfig(max_new_tokens=2, **said))
        before, ours.generation_config = ours.generation_config, GenerationConfig(max_new_tokens=2, **said)
        try:
            with pytest.raises(SettingError, match=f"{name}: "):
                ours.generate(IDS)
            assert ours.generate(IDS, **{name: None}).shape == (1, 10), "the call's word counts"
        finally:
            ours.generation_config = before
    assert ours.channel.stats.calls == calls or name in SETTINGS, "nothing is computed before"


def test_settings_in_the_directory_count_alike(server: fastsplit.Server, directory: Path) -> None:
    tokenizer = make_tokenizer()
    settings = {"max_new_tokens": STEPS, "pad_token_id": 0}
    path = directory / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**settings, "stop_strings": [stop_string(load_hf(directory))]}))
        with SplitModelForCausalLM.connect(server.uri, directory) as model:
            found = model.generate(IDS, tokenizer=tokenizer)
            assert torch.equal(found, load_hf(directory).generate(IDS, tokenizer=tokenizer))
            assert found.shape[1] < IDS.shape[1] + STEPS
            with pytest.raises(ValueError, match="stop strings"):  # transformers' own words
                model.generate(IDS)
        path.write_text(json.dumps({**settings, "penalty_alpha": 0.6}))
        with SplitModelForCausalLM.connect(server.uri, directory) as model:
            with pytest.raises(SettingError, match=r"penalty_alpha: 0\.6, not supported"):
                model.generate(IDS)
    finally:
        path.write_text(before)


def test_a_split_model_helps_one_with_another_tokenizer(
    ours: SplitModelForCausalLM, reference: Any, stranger: Any
) -> None:
    found = []
    for assistant in (reference, ours):
        options = {"tokenizer": make_tokenizer(first=3), "assistant_tokenizer": make_tokenizer()}
        found.append(tokens(stranger.generate(IDS, assistant_model=assistant, max_new_tokens=STEPS, **options)))
    assert found[0] == found[1]
    with pytest.raises(NotImplementedError, match="a split model has no output embeddings"):
        ours.get_output_embeddings()


def test_an_unknown_keyword_is_refused_as_transformers_does(ours: SplitModelForCausalLM, reference: Any) -> None:
    for model in (ours, reference):
        for name in ("stop_string", "return_dict", "token_type_ids"):
            with contextlib.suppress(NotImplementedError), pytest.raises(ValueError, match=name):
                model.generate(IDS, max_new_tokens=2, **{name: IDS})
