"""HF's own class in one process, undivided: what the split is compared with, in time, in logits and in tokens.

    python -m benches.rivals.hf --model random:tiny

Serves over a unix socket, and times itself; prints `READY uri` and ends when its stdin does.

    prefill     ids [n] int64; attribute attention ("eager" or "sdpa"). Replies with the last position's logits [vocab]
                fp32; wall_s is the forward pass's own time
    generate    ids [n] int64; attributes attention, new_tokens, by ("generate": GenerationMixin's, greedy; "forward":
                the model's forward with its cache in a loop). Replies with the new tokens [new_tokens] int64; wall_s
                is all of it, decode_s what came after the first token

HF at its best, and comparable: the same weights, dtype and threads; inference mode; `use_cache=True` and
`logits_to_keep=1`, as the split does. No token ends a sequence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from time import perf_counter_ns
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, DynamicCache
from transformers.utils import logging

from fastsplit import Call, Server
from fastsplit.models import DTYPES, Model, open_model

__all__ = ["load", "main"]


def load(model: Model, dtype: str) -> Any:
    """The model's own weights in HF's class, ready to infer."""
    known = {name: value for name, value in model.config.to_hf().items() if name != "architectures"}
    config: Any = AutoConfig.for_model(**known)
    torch_dtype = getattr(torch, dtype)
    weights = {name: weight.to(torch_dtype) for name, weight in model.items()}
    # from_pretrained, since the constructor would first fill a second copy of the weights with random numbers
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    hf: Any = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch_dtype)
    return hf.eval()


class _FirstToken:
    """A streamer that only notes when the first new token came."""

    def __init__(self) -> None:
        self.puts = 0
        self.first_ns = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # before it comes the prompt
            self.first_ns = perf_counter_ns()

    def end(self) -> None:
        pass


def _generate(hf: Any, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], int]:
    """The tokens, and when the first of them came."""
    noted = _FirstToken()
    tokens = hf.generate(
        ids[None],
        attention_mask=torch.ones_like(ids)[None],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        streamer=noted,
    )
    return tokens[0, len(ids) :].tolist(), noted.first_ns


def _forward(hf: Any, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], int]:
    tokens: list[int] = []
    first_ns = 0
    cache = DynamicCache(config=hf.config)
    step = ids[None]
    while len(tokens) < new_tokens:
        logits = hf(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(int(step))
        first_ns = first_ns or perf_counter_ns()
    return tokens, first_ns


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.rivals.hf", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random:tiny", help="a HF directory, or random:PRESET[@SEED]")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: one for each core")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hf = load(open_model(args.model), args.dtype)
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = 0

    def prefill(call: Call) -> torch.Tensor:
        (ids,) = call.tensors
        hf.set_attn_implementation(call.attrs["attention"])
        with torch.inference_mode():
            started_ns = perf_counter_ns()
            logits: torch.Tensor = hf(ids[None], use_cache=True, logits_to_keep=1).logits
            call.reply_attrs["wall_s"] = (perf_counter_ns() - started_ns) * 1e-9
            return logits[0, -1].float()

    def generate(call: Call) -> torch.Tensor:
        (ids,) = call.tensors
        hf.set_attn_implementation(call.attrs["attention"])
        by = _generate if call.attrs["by"] == "generate" else _forward
        with torch.inference_mode():
            started_ns = perf_counter_ns()
            tokens, first_ns = by(hf, ids.clone(), call.attrs["new_tokens"])
            ended_ns = perf_counter_ns()
        call.reply_attrs.update(wall_s=(ended_ns - started_ns) * 1e-9, decode_s=(ended_ns - first_ns) * 1e-9)
        return torch.tensor(tokens)

    with (
        tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory,
        Server(f"unix://{directory}/hf.sock", {"prefill": prefill, "generate": generate}) as server,
    ):
        print("READY", server.uri, flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
