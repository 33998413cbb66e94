"""The TEE side as a script: runs a prompt against a GPU side, prints the text as it comes, then a report of the time.

    python -m fastsplit.tee_side --connect URI [--model DIR]
        [--prompt TEXT | --prompt-file F | --prompt-ids 1,2,3 | --prefill N]

Rules. Text, or with `--format json` exactly one JSON document, goes to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import os
import sys

if __package__ in (None, ""):  # run by path: this folder must not be where imports are looked for
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsplit import cli, native
from fastsplit.errors import FastsplitError, ModelError
from fastsplit.models import DTYPES, Model, ModelConfig, open_model
from fastsplit.split.contract import MAX_LANES
from fastsplit.split.plan import PLAN_ALIASES, PLANS
from fastsplit.tee.tuning import ASKED_FOR, CASTS
from fastsplit.wire.call import describe

if TYPE_CHECKING:
    import torch

    from fastsplit.tee.open import Split
    from fastsplit.tee.remote import RemoteModel
    from fastsplit.tee.report import Recorder

__all__ = ["main"]

_PROGRAM = "tee_side"
_TOP_LOGITS = 10
_CODECS = ("auto", "off", "zlib", "lz4", "zstd", "blosc2")
_LINK = ("rtt_s", "send_bytes_per_s", "receive_bytes_per_s")
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code (cli.py lists them)."""
    return cli.run_main(_PROGRAM, lambda: _parser().parse_args(argv), _run)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(_PROGRAM, "Runs a prompt, layer by layer, against a GPU side.")
    parser.add_argument("--connect", required=True, metavar="URI", help="where the GPU side listens")
    parser.add_argument(
        "--model",
        metavar="DIR|random:PRESET[@SEED]",
        help="the trusted copy: configuration and norm weights come from it, and the GPU side's are checked against it",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer is, if not in --model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", type=Path)
    source.add_argument("--prompt-ids", metavar="1,2,3", type=_ids, help="token ids")
    source.add_argument("--prefill", metavar="N", type=cli.positive_int, help="N random ids, seeded by --seed")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="0 stops after the prompt")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at an end-of-sequence token")
    parser.add_argument(
        "--plan",
        type=_plan,
        choices=("auto", *PLANS),
        default="auto",
        help="the steps that go in one call; auto: by model and link",
    )
    parser.add_argument(
        "--tee-dtype", choices=DTYPES, help="dtype of the arithmetic in here; --wire-dtype if not given"
    )
    parser.add_argument(
        "--wire-dtype",
        choices=DTYPES,
        help="dtype of the tensors that both sides exchange; the GPU side's if not given",
    )
    parser.add_argument(
        "--lanes",
        type=_lanes,
        metavar="N",
        help="chunks of the prompt in flight at once; if not given 4 to 8 on a remote link, else 2 if the GPU side "
        "computes on a device of its own, else 1",
    )
    parser.add_argument(
        "--cast",
        choices=CASTS,
        default="auto",
        help="dtype of float32 tensors on the link; auto: float16 if it is slow",
    )
    parser.add_argument(
        "--codec", choices=_CODECS, default="auto", help="how tensors are compressed on network links; auto: if it pays"
    )
    parser.add_argument("--temperature", type=_not_negative, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=_count, default=0, metavar="K", help="draw from the K most likely; 0: from all")
    parser.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P", help="draw from the most likely that make up P"
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of --prefill and of sampling")
    parser.add_argument("--timeout-s", type=_seconds, default=300.0, metavar="S", help="for each call")
    parser.add_argument("--connect-timeout-s", type=_seconds, default=10.0, metavar="S")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a Chrome trace")
    return parser


def _run(args: argparse.Namespace) -> int:
    trusted = None if args.model is None else open_model(args.model)
    tokenizer = _open_tokenizer(args, trusted)
    from fastsplit.extras import torch
    from fastsplit.tee.open import open_split
    from fastsplit.tee.report import Recorder, chrome_trace, table
    from fastsplit.tee.sampling import Sampling

    cli.set_threads(args.threads)
    ids: torch.Tensor

    def prompt_rows(model: RemoteModel) -> int:
        nonlocal ids
        if trusted is None:
            cli.tell(
                _PROGRAM,
                "warning: configuration and norm weights come from the GPU side, unchecked; "
                "give --model to use a trusted copy",
            )
        ids = _prompt_ids(args, model.config, tokenizer)
        return len(ids)

    recorder = Recorder(keep_spans=args.trace is not None)
    with open_split(
        args.connect,
        trusted,
        rows=prompt_rows,
        plan=args.plan,
        lanes=args.lanes,
        cast=args.cast,
        codec=args.codec,
        tee_dtype=args.tee_dtype,
        wire_dtype=args.wire_dtype,
        timeout_s=args.connect_timeout_s,
        call_timeout_s=args.timeout_s,
        recorder=recorder,
    ) as split:
        if split.link is not None:
            for line in split.tuning.lines():
                cli.tell(_PROGRAM, line)
        setup = split.channel.stats.as_dict()
        printer = _Printer(tokenizer, args.format == "text")
        top: list[list[float]] = []

        def keep_top(logits: torch.Tensor) -> None:
            values, indices = logits.topk(min(_TOP_LOGITS, len(logits)))
            top.extend([index, value] for index, value in zip(indices.tolist(), values.tolist()))

        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        with torch.inference_mode():
            for token in split.runner.generate(
                ids, args.max_new_tokens, sampling=sampling, on_prefill=keep_top, ignore_eos=args.ignore_eos
            ):
                printer.add(token)
        results = {
            "prompt_tokens": len(ids),
            "new_tokens": len(printer.tokens),
            "tokens": printer.tokens,
            "text": printer.finish(),
            "top_logits": top,
        }
        report = _report(args, split, recorder, setup, results)
    if args.format == "json":
        print(json.dumps(report), flush=True)
    else:
        print(table(report), file=sys.stderr)
    if args.trace is not None:  # last: a file that cannot be written costs nothing else
        chrome_trace(recorder, args.trace)
    return 0


def _report(
    args: argparse.Namespace, split: Split, recorder: Recorder, setup: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """The JSON document. `setup`: the channel's counts before the prompt ran; `results`: what the run gave."""
    from fastsplit.tee.report import codec_counts

    channel, model, link, tuning, runner = split.channel, split.model, split.link, split.tuning, split.runner
    stats = channel.stats.as_dict()
    return {
        "plan": runner.plan,
        "plan_wanted": args.plan,
        "plan_reason": "" if tuning.plan_reason == ASKED_FOR else tuning.plan_reason,
        "uri": args.connect,
        "shm": channel.shm,
        "shm_reason": channel.shm_reason,
        "native": native,
        "model": model.name,
        "dtype": model.dtype,
        "wire_dtype": runner.wire_dtype,
        "tee_dtype": runner.tee_dtype,
        "lanes": runner.lanes,
        "lanes_reason": tuning.lanes_reason,
        "block_rows": tuning.block_rows,
        "link": dict.fromkeys(_LINK) if link is None else {name: getattr(link, name) for name in _LINK},
        "cast": runner.cast or "off",
        "cast_reason": tuning.cast_reason,
        "codec": channel.codec,
        "codecs": codec_counts(channel.stats),
        **results,
        **recorder.as_dict(),
        "setup_calls": stats["calls"] - recorder.rpc_calls,
        **{key: stats[key] - setup[key] for key in stats if key.startswith("bytes_")},
    }


class _Printer:
    """Collects new tokens, and prints their text as soon as further tokens cannot change it.

    Text is withheld in the middle of a character, and in a run of byte tokens (`<0x0A>`, Llama 2's spelling of
    characters without a token): one byte that does not fit turns the whole run into replacement characters. Each step
    decodes all tokens, because only the text of all of them is final.
    """

    def __init__(self, tokenizer: Any, streaming: bool) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._streaming = streaming
        self._printed = ""
        self._in_bytes = False

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if not self._streaming:
            return
        if self._tokenizer is None:
            cli.write(f"{token} ")
            return
        if self._is_byte(token):
            self._in_bytes = True
        elif self._decode([token]):  # a token without text, such as a special token, ends no run
            self._in_bytes = False
        if not self._in_bytes:
            text = self._decode(self.tokens).rstrip(_REPLACEMENT)
            if text.startswith(self._printed):
                cli.write(text[len(self._printed) :])
                self._printed = text

    def finish(self) -> str:
        """Prints the rest, and returns the whole text ("" without a tokenizer)."""
        text = "" if self._tokenizer is None else self._decode(self.tokens)
        if self._streaming and self.tokens:
            if not text.startswith(self._printed):
                cli.write("\n")
                cli.tell(_PROGRAM, "the tokenizer changed text that was printed already; here is all of it")
                self._printed = ""
            cli.write(text[len(self._printed) :] + "\n")
        return text

    def _decode(self, tokens: list[int]) -> str:
        with _tokenizer_failures(f"tokenizer: decoding {len(tokens)} tokens"):
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _is_byte(self, token: int) -> bool:
        with _tokenizer_failures(f"tokenizer: token {token}"):
            return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None


@contextmanager
def _tokenizer_failures(what: str) -> Iterator[None]:
    """Turns any error of a tokenizer, its files or its chat template into a ModelError that begins with `what`; its
    output goes through `cli.retold`. These files belong to the model and may hold anything."""
    try:
        with cli.retold(_PROGRAM):
            yield
    except (FastsplitError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (a panic of the tokenizers' Rust is no Exception)
        raise ModelError(f"{what}: {' '.join(describe(error).split())}") from None


def _open_tokenizer(args: argparse.Namespace, trusted: Model | None) -> Any:
    """The tokenizer; None if none is needed. Raises Usage if the prompt is text and there is no tokenizer."""
    directory = Path(args.tokenizer) if args.tokenizer is not None else None if trusted is None else trusted.directory
    if directory is None or not (directory / "tokenizer.json").is_file():
        if args.tokenizer is not None:
            raise ModelError(f"tokenizer {args.tokenizer!r}: no tokenizer.json there")
        if args.prompt is not None or args.prompt_file is not None or args.chat:
            raise cli.Usage(
                "a text prompt needs a tokenizer: give --tokenizer DIR, or --model DIR with tokenizer.json in it; "
                "or --prompt-ids 1,2,3 without one"
            )
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # files are read from the directory alone
    with _tokenizer_failures(f"tokenizer {str(directory)!r}"):
        from fastsplit.extras import transformers

        # Without trust_remote_code it asks on stdin whether to run the model's own code.
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )


def _prompt_ids(args: argparse.Namespace, config: ModelConfig, tokenizer: Any) -> torch.Tensor:
    """The prompt's ids, [n] int64, n of 1 or more. Raises Usage if they do not fit the model."""
    from fastsplit.extras import torch

    ids = [] if args.prefill is not None else _text_ids(args, tokenizer)
    count = args.prefill or len(ids)
    if not count:
        raise cli.Usage("an empty prompt, expected one token or more")
    if count + args.max_new_tokens > config.max_position_embeddings:
        raise cli.Usage(
            f"{count} prompt tokens and {args.max_new_tokens} new ones, "
            f"the model has {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    if args.prefill is not None:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        return torch.randint(0, config.vocab_size, (count,), generator=generator, dtype=torch.int64, device="cpu")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise cli.Usage(f"prompt ids {min(ids)} to {max(ids)}, expected 0 to {config.vocab_size - 1}")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _text_ids(args: argparse.Namespace, tokenizer: Any) -> list[int]:
    if args.prompt_ids is not None:
        ids: list[int] = args.prompt_ids
        return ids
    try:
        text: str = args.prompt if args.prompt is not None else args.prompt_file.read_text(encoding="utf-8")
        text.encode()
    except UnicodeError:
        raise cli.Usage("the prompt is not UTF-8 text") from None
    if not args.chat:
        with _tokenizer_failures("tokenizer: the prompt"):
            return list(tokenizer(text)["input_ids"])
    with _tokenizer_failures("--chat"):
        if not tokenizer.chat_template:
            raise cli.Usage("--chat: the tokenizer has no chat template")
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _plan(text: str) -> str:
    return PLAN_ALIASES.get(text, text)


def _ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers with commas between them") from None


def _number(low: float, high: float, text: str) -> float:
    value = float(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text}, expected {low:g} to {high:g}")
    return value


def _not_negative(text: str) -> float:
    return _number(0, float("inf"), text)


def _lanes(text: str) -> int:
    return int(_number(1, MAX_LANES, text))


def _share(text: str) -> float:
    return _number(1e-6, 1, text)


def _seconds(text: str) -> float:
    return _number(1e-3, 1e6, text)


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value}, expected 0 or more")
    return value


if __name__ == "__main__":
    code = main()
    cli.ignore_stops()
    sys.exit(code)
