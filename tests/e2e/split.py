"""What the end-to-end tests share: both sides in one process over a real link, and Hugging Face's model beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastsplit
from fastsplit.executor.device import Device
from fastsplit.executor.service import Executor
from fastsplit.models import Model, ModelConfig, open_model
from fastsplit.split.blocks import choose_block_rows, row_blocks
from fastsplit.split.plan import PLANS
from fastsplit.tee.chunks import Cutter
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

# Both sides are in this process: two pools of OpenMP threads that spin for the same cores would only slow each other
# down.
torch.set_num_threads(1)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one kv head for each head": {"num_key_value_heads": 6},
    "one kv head for all": {"num_key_value_heads": 1},
    "head_dim is not hidden / heads": {"head_dim": 20},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "everything at once": {
        "head_dim": 32,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 1e-3,
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 100,
    },
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 50},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 50,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 50,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    },
    "phi3": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "head_dim": 16,
        "hidden_size": 96,
        "sliding_window": 60,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * i for i in range(6)],
            "long_factor": [2.0 + 0.5 * i for i in range(6)],
            "original_max_position_embeddings": 64,
        },
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
}
"""Changes to TINY, by name."""


def make_model(directory: Path, changes: dict[str, Any], seed: int = 0) -> Model:
    """A small random model in HF's own format, with norms and biases that are not trivial."""
    torch.manual_seed(seed)
    changes = {"model_type": "llama", **TINY, **changes}
    config = AutoConfig.for_model(changes.pop("model_type"), **changes)
    model = AutoModelForCausalLM.from_config(config)
    around = 0.0 if config.model_type.startswith("gemma") else 1.0  # what Gemma's are relative to
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(around if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return open_model(str(directory))


def load_hf(directory: Path | str, dtype: str = "float32", attention: str = "eager") -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], attn_implementation=attention)
    return model.eval()


Named = tuple[Model, Any]
"""Ours, and HF's."""


def named_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    """A model of CONFIGS by its name, made when it is first asked for."""
    made: dict[str, Named] = {}

    def get(name: str) -> Named:
        if name not in made:
            directory = tmp_path_factory.mktemp("models") / "model"
            make_model(directory, CONFIGS[name])
            made[name] = open_model(str(directory)), load_hf(directory)
        return made[name]

    return get


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Ids of a TINY model."""
    return torch.randint(0, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def split(
    model: Model,
    uri: str,
    *,
    plan: str,
    dtype: str = "float32",
    device: Device | None = None,
    trusted: bool = True,
    **options: Any,
) -> Iterator[tuple[Runner, fastsplit.Channel]]:
    """Both sides on `uri`, the TEE side with the trusted copy (without one, if `trusted` is False). `options`: the
    Runner's."""
    executor = Executor(model, dtype=dtype, device=device)
    with (
        fastsplit.Server(uri, executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        runner = Runner(RemoteModel.fetch(channel, model if trusted else None), channel, plan, **options)
        yield cut_as_with_scores(runner, options.get("scores_nbytes"), options.get("block_rows")), channel


def cut_as_with_scores(runner: Runner, scores_nbytes: int | None, block_rows: int | None = None) -> Runner:
    """The same runner, which cuts prompts as one does whose scores may take `scores_nbytes` (None: as it is). So tests
    of chunks mean the same for plans that have no scores."""
    if scores_nbytes is not None and PLANS[runner.plan].cache_in_tee:
        itemsize = DTYPES[runner.wire_dtype].itemsize
        args = (itemsize, runner.lanes, block_rows, scores_nbytes)
        runner._cutter = Cutter(runner.config, PLANS["folded"], *args)
    return runner


PACKED_MULTIPLE = 1024
"""Of elements of scores in a message; with each token's own number, each would be a message of another shape."""


class Message(NamedTuple):
    """One call, and the bytes of the tensors in it."""

    steps: str
    sent: int
    received: int
    private: int = 0
    """Of those sent, what is made nowhere else than in private memory: token ids, selected rows."""


def messages(
    config: ModelConfig,
    plan: str,
    *,
    rows: int,
    start: int = 0,
    batch: int = 1,
    keep: str = "last",
    wants_logits: bool = True,
    itemsize: int = 4,
    with_embedding: bool = True,
    exact: bool | None = None,
) -> list[Message]:
    """The calls of one chunk of a forward pass, without padding: `rows` of each sequence behind `start` positions.

    What the split has to move and nothing else: kv heads are never repeated, V and the cache stay where they are (but
    for the new rows of V in per-op, batched and tee-attention), scores end at the diagonal, and behind the last layer's
    scores go only the rows that are wanted. `wants_logits`: whether the chunk has a wanted row at all.

    For tee-attention. `with_embedding`: the embeddings are looked up in the TEE. `exact`: norms are not folded; None:
    for models that have norms behind attention and MLP.
    """
    hidden, inter, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, q, kv = config.num_attention_heads, config.out_features("q"), config.out_features("k")
    layers, n = config.num_hidden_layers, batch * rows
    selects = keep == "last" and rows > 1 and wants_logits
    ids, selected = 8 * n, 8 * batch if selects else 0
    select = "select " if selects else ""
    scales = 4 * n if n > 1 else 0  # of one row it is an attribute
    tables = 2 * 4 * rows * config.rope.rotary_dim(config.head_dim) // 2
    here = plan == "tee-attention"
    if exact is None:
        exact = here and config.post_norms
    found: list[Message] = []

    def add(steps: str, sent: int, received: int, more: int = 0, private: int = 0) -> None:
        """Elements that are sent and received, and bytes beside them."""
        found.append(Message(steps, itemsize * sent + more, itemsize * received, private))

    def scores(layer: int) -> int:
        """Elements of a layer's scores, whole rows but for what is behind the diagonal or before the window; as many
        as lie in their tensor, which has a round number of them."""
        window = config.window(layer)
        if layer == layers - 1 and selects:
            blocks = row_blocks(1, start + rows, 1, window)
        else:
            blocks = row_blocks(rows, start + rows, choose_block_rows(rows), window)
        elements = batch * heads * sum(block.rows * block.columns for block in blocks)
        return -(-elements // PACKED_MULTIPLE) * PACKED_MULTIPLE

    qkv = q + 2 * kv
    if plan in ("per-op", "batched", "fused") or (exact and not with_embedding):
        add("embed", 0, n * hidden, ids, ids)
    elif plan == "folded":
        add("embed norm qkv store_v", 0, n * (hidden + q + kv), ids, ids)
    elif plan == "minimal" and layers == 1 and not wants_logits:
        add("embed tables norm qkv store_v rope store_k", 0, n * hidden, ids + tables, ids)
    elif plan == "minimal":
        own, which = (selected, select) if layers == 1 else (0, "")
        text = f"embed tables norm qkv store_v rope store_k {which}scores"
        add(text, 0, n * hidden + scores(0), ids + tables + own, ids + own)
    elif not exact and with_embedding:
        add("residual norm qkv", n * hidden, n * qkv)
    elif not exact:
        add("embed norm qkv", 0, n * (hidden + qkv), ids, ids)
    for layer in range(layers):
        final = layer == layers - 1
        r = batch if final and selects else n
        ends = final and not wants_logits
        own, which = (selected, select) if final else (0, "")
        # the products before the scores
        if plan == "per-op":
            for name, width in (("q", q), ("k", kv), ("v", kv)):
                add(name, n * hidden, n * width)
        elif plan == "batched" or exact:
            add("qkv", n * hidden, n * qkv)
        elif plan == "fused":
            add("qkv store_v", n * hidden, n * (q + kv))
        # a chunk that only fills the cache is over with the last layer's keys and values
        if ends:
            if plan in ("per-op", "batched"):
                add("store_k", n * kv, 0)
                add("store_v", n * kv, 0)
            elif plan == "fused":
                add("store_k", n * kv, 0)
            elif plan == "folded":
                add("store_k scale_v", n * kv, 0, scales)
            elif plan == "minimal":
                add("scale_kv", 0, 0, scales)
            return found
        # scores
        if plan in ("per-op", "batched", "fused"):
            add("store_k scores", r * q + n * kv, scores(layer))
        elif plan == "folded":
            add(f"store_k scale_v {which}scores", r * q + n * kv, scores(layer), own + scales, own)
        # weighted values, and what follows up to the activation
        if plan in ("per-op", "batched"):
            add("store_v values", scores(layer) + n * kv, r * q)
            add("o", r * q, r * hidden)
        elif plan == "fused":
            add("values o", scores(layer), r * hidden)
        elif plan == "folded":
            add("values o add norm gate_up", scores(layer), r * (hidden + 2 * inter))
        elif plan == "minimal":
            add("scale_kv values o add norm gate_up", scores(layer), r * (hidden + 2 * inter), scales)
        elif exact:
            add("o", r * q, r * hidden)
        else:
            add(f"{which}o add norm gate_up", r * q, r * (hidden + 2 * inter), own, own)
        if plan == "per-op":
            add("gate", r * hidden, r * inter)
            add("up", r * hidden, r * inter)
        elif plan in ("batched", "fused") or exact:
            add("gate_up", r * hidden, r * 2 * inter)
        # behind the activation
        if plan in ("per-op", "batched", "fused") or exact:
            add("down", r * inter, r * hidden)
        elif final:
            add("down add norm lm_head", r * inter, r * (hidden + vocab))
        elif plan == "folded":
            add("down add norm qkv store_v", n * inter, n * (hidden + q + kv))
        elif here:
            add("down add norm qkv", n * inter, n * (hidden + qkv))
        elif layer == layers - 2 and not wants_logits:
            add("down add norm qkv store_v rope store_k", n * inter, n * hidden)
        else:
            own, which = (selected, select) if layer == layers - 2 else (0, "")
            text = f"down add norm qkv store_v rope store_k {which}scores"
            add(text, n * inter, n * hidden + scores(layer + 1), own, own)
    if plan in ("per-op", "batched", "fused") or exact:
        rows_out = batch if selects else n
        add("lm_head", rows_out * hidden, rows_out * vocab)
    return found


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| / max |reference|, in fp32."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())
