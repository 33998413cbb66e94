"""HF's LlamaForCausalLM in one process, undivided: what the split is compared with, in time and in logits.

    python -m benches.rivals.hf --model random:tiny

Serves `prefill` (ids [n] int64; attribute attention, "eager" or "sdpa") over a unix socket, replies with the last
position's logits [vocab] fp32 and the forward pass's own time as `wall_s`, so that the way to here costs nothing.
Prints `READY uri` and ends when its stdin does.

What makes it comparable: the same weights, dtype and threads; `use_cache=True`, since the split fills its KV cache in a
prefill too; `logits_to_keep=1`, since the split computes only the last row of logits. What HF does not do: in the
last layer, go on with the last row alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from time import perf_counter_ns
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fastsplit import Call, Server
from fastsplit.models import DTYPES, Model, open_model

__all__ = ["load", "main"]


def load(model: Model, dtype: str) -> Any:
    """The model's own weights in HF's class, ready to infer."""
    known = {name: value for name, value in model.config.to_hf().items() if name not in ("model_type", "architectures")}
    torch_dtype = getattr(torch, dtype)
    weights = {name: weight.to(torch_dtype) for name, weight in model.items()}
    # from_pretrained, since the constructor would first fill a second copy of the weights with random numbers
    hf: Any = LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**known), state_dict=weights, dtype=torch_dtype)
    return hf.eval()


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

    def prefill(call: Call) -> torch.Tensor:
        (ids,) = call.tensors
        hf.set_attn_implementation(call.attrs["attention"])
        with torch.inference_mode():
            started_ns = perf_counter_ns()
            logits: torch.Tensor = hf(ids[None], use_cache=True, logits_to_keep=1).logits
            call.reply_attrs["wall_s"] = (perf_counter_ns() - started_ns) * 1e-9
            return logits[0, -1].float()

    with (
        tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory,
        Server(f"unix://{directory}/hf.sock", {"prefill": prefill}) as server,
    ):
        print("READY", server.uri, flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
