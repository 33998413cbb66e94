"""What the end-to-end tests share: both sides in one process over a real link, and Hugging Face's model beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastsplit
from fastsplit.devices import Device
from fastsplit.executor import Executor
from fastsplit.models import Model, ModelConfig, open_model
from fastsplit.runner import PLANS, RemoteBackend, RemoteModel, Runner

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
}


def make_model(directory: Path, changes: dict[str, Any], seed: int = 0) -> Model:
    """A small random model in HF's own format, with norms and biases that are not trivial."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return open_model(str(directory))


def load_hf(directory: Path | str, dtype: str = "float32", attention: str = "eager") -> Any:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], attn_implementation=attention)
    return model.eval()


@contextlib.contextmanager
def split(
    model: Model, uri: str, *, plan: str, dtype: str = "float32", device: Device | None = None
) -> Iterator[tuple[Runner, fastsplit.Channel]]:
    """Both sides on `uri`, the TEE side with the trusted copy."""
    executor = Executor(model, dtype=dtype, device=device)
    with (
        fastsplit.Server(uri, executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        remote = RemoteModel.fetch(channel, model)
        yield Runner(remote, RemoteBackend(channel, remote.config, remote.dtype), plan), channel


def decode_elements(config: ModelConfig, plan: str, positions: int) -> tuple[int, int]:
    """Elements of all tensors that a decode step with so many positions has to send, and to receive, but for its ids:
    what the split has to move and nothing else."""
    hidden, inter, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, q = config.num_attention_heads, config.num_attention_heads * config.head_dim
    kv_row = config.num_key_value_heads * config.head_dim
    inputs = sum(len(groups) for groups in PLANS[plan]) * hidden
    sent = layers * (inputs + (q + positions * kv_row) + (heads * positions + positions * kv_row) + q + inter)
    received = layers * ((q + 2 * kv_row) + heads * positions + q + hidden + 2 * inter + hidden)
    return sent + hidden, received + hidden + config.vocab_size


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| / max |reference|, in fp32."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())
