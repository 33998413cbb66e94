"""The split as a causal LM of transformers: `generate`, with everything it can do, against a GPU side.

    with SplitModelForCausalLM.connect("unix:///tmp/gpu.sock", "models/llama") as model:
        model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=50, num_beams=4)

`generate` is GenerationMixin's own; what is here is a `forward` that runs layer by layer (runner.py), and a
`SplitCache` that goes through `generate` as `past_key_values` while keys and values lie in a session on the executor.

Rules. No weights are here: configuration and generation settings come from the directory, norm weights are the
runner's. Positions are what transformers makes them: given ones, else counted from the cache's length, whatever the
mask says. Sequences of a prompt that are the same (beams, `num_return_sequences`) are run once and then repeated. A
call that fails leaves the cache as it was. A cache's session ends with `close`, or after its last reference is gone: a
destructor only notes that, since it may run in any thread and in the middle of a call, and the next call or the end of
`generate` closes what is noted. Calls from several threads take turns.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .extras import torch, transformers  # noqa: F401 (first: where one is missing, this says how to get it)

# isort: split
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import FastsplitError, ModelError, SettingError, VerificationError
from .models import open_model
from .split.functional import int64, int64_range
from .system.forked import renew, watch
from .tee.remote import Cache, RemoteModel, share_cores
from .tee.runner import Runner
from .tee.tuning import choose, look, may_overlap
from .wire.blocking.channel import Channel

__all__ = ["SplitCache", "SplitModelForCausalLM"]

_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
_GENERATES_OWN = {*inspect.signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"}
"""Keywords that are for `generate` alone. In some modes it hands them on to forward, where HF's models ignore them."""


def _is_given(value: Any) -> bool:
    return value is not None


_NOTHING_OF_A_LAYER = (bool, "which keeps nothing of a layer")
_ONE_SEQUENCE_A_ROW = (_is_given, "where each row of a batch is one sequence")
_CODE_ELSEWHERE = "which runs no code of a repository, and transformers has this mode only there"
_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "inputs_embeds": (_is_given, "whose embeddings are on the executor"),
    "output_attentions": _NOTHING_OF_A_LAYER,
    "output_hidden_states": _NOTHING_OF_A_LAYER,
    "is_causal": (lambda value: value is False, "which computes causal attention alone"),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), _ONE_SEQUENCE_A_ROW),
    "cache_implementation": (
        # "hybrid" is in older checkpoints of Gemma; transformers takes a dynamic cache for it
        lambda value: value not in (None, "dynamic", "dynamic_full", "hybrid"),
        "whose keys and values are on the executor",
    ),
    "custom_generate": (
        lambda value: isinstance(value, str),
        "which runs no code of a repository: give a function instead of its name",
    ),
    "assistant_early_exit": (_is_given, "which runs all layers"),
    "use_mtp": (bool, "which has no heads for several tokens"),
    "speculation_type": (_is_given, "whose embeddings are on the executor"),
    "penalty_alpha": (bool, _CODE_ELSEWHERE),
    "dola_layers": (_is_given, _CODE_ELSEWHERE),
    "num_beam_groups": (lambda value: value not in (None, 0, 1), _CODE_ELSEWHERE),
    "diversity_penalty": (bool, _CODE_ELSEWHERE),
    "constraints": (_is_given, _CODE_ELSEWHERE),
    "force_words_ids": (_is_given, _CODE_ELSEWHERE),
}
"""What transformers documents for `generate` and `forward` and a split model refuses: from which values on, and why.
Everything else gives HF's own tokens and logits; tests/e2e/test_generate_keywords.py goes through all there is."""
_SPARE_POSITIONS = 256
"""What a cache has room for at first beyond its first input: a `max_length` may be far more than what comes."""


class _Sessions:
    """The sessions that a runner has on its executor, and whose turn it is to use it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.lock = threading.RLock()
        self._abandoned: deque[Cache] = deque()
        watch(self)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        renew(self.lock)
        self._abandoned.clear()

    def watch(self, holder: object, session: Cache) -> weakref.finalize[..., object]:
        """Sees to it that the session is closed some time after the holder is gone. Detach it to prevent that."""
        finalizer = weakref.finalize(holder, self._abandoned.append, session)
        finalizer.atexit = False  # by then the connection is gone, and everything with it
        return finalizer

    def close_abandoned(self, *, wait: bool = True) -> None:
        with self.lock:
            while self._abandoned:
                # If the connection is lost so are its sessions; whoever needs it next is told.
                with contextlib.suppress(FastsplitError):
                    self._abandoned.popleft().close(wait=wait)


class SplitCache(TransformersCache):
    """Keys and values in a session on the executor, as a cache of transformers. Made by `SplitModelForCausalLM`.

    It opens its session with the first input. All that can be done to it is what decoding needs: append (by `forward`),
    crop, reorder, repeat and select. Its contents cannot be read or copied from here.
    """

    def __init__(self, sessions: _Sessions, expected: int | None) -> None:
        super().__init__(layers=[])
        self._sessions = sessions
        self._expected = expected
        self._session: Cache | None = None
        self._finalizer: weakref.finalize[..., object] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch={self.batch_size}, length={self.get_seq_length()})"

    def __len__(self) -> int:
        return self._sessions.runner.config.num_hidden_layers

    def __copy__(self) -> SplitCache:
        raise TypeError("a SplitCache cannot be copied: what it holds is on the executor; crop it to use it again")

    def __deepcopy__(self, memo: Any) -> SplitCache:
        return self.__copy__()

    @property
    def batch_size(self) -> int:
        """Sequences in it, -1 before the first input."""
        return -1 if self._session is None else self._session.batch

    @property
    def is_initialized(self) -> bool:
        return self._session is not None

    @property
    def _hides_padding(self) -> bool:
        return self._session is not None and self._session.mask is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions filled, padding included."""
        return 0 if self._session is None else self._session.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises TypeError: only `SplitModelForCausalLM.forward` adds to it."""
        raise TypeError("a SplitCache takes no keys and values: they are on the executor")

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` positions; a positive number is the length to keep, as it was before
        transformers 5.23."""
        length = self.get_seq_length()
        self._truncate(length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length))

    def _truncate(self, length: int, *, wait: bool = True) -> None:
        if self._session is not None and length < self._session.length:
            with self._sessions.lock:
                self._session.truncate(max(length, 0), wait=wait)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence i the former `beam_idx[i]`, [new batch] integers."""
        if self._session is None:
            return
        indices = beam_idx.to("cpu", torch.int64)
        if not torch.equal(indices, int64_range(0, self._session.batch)):
            with self._sessions.lock:
                self._session.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, side by side."""
        self.reorder_cache(int64_range(0, max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices`, integers or [batch] bool."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Empties it: as new, for a batch of any size."""
        self.close()

    def close(self) -> None:
        """Ends the session on the executor; idempotent. With the next input it opens another one."""
        session, self._session = self._session, None
        if session is not None:
            assert self._finalizer is not None
            self._finalizer.detach()
            with self._sessions.lock:
                session.close()

    def _open(self, batch: int, rows: int) -> Cache:
        """The session, made if there is none yet."""
        if self._session is not None and not self._session.length and self._session.batch != batch:
            self.close()
        if self._session is None:
            capacity = rows + _SPARE_POSITIONS
            if self._expected is not None:
                capacity = min(capacity, max(self._expected, rows))
            self._session = self._sessions.runner.new_cache(batch=batch, capacity=capacity)
            self._finalizer = self._sessions.watch(self, self._session)
        return self._session

    @contextlib.contextmanager
    def _unchanged_by_failure(self) -> Iterator[None]:
        length = self.get_seq_length()
        try:
            yield
        except BaseException:
            if length:
                # If that fails too, the connection is lost.
                with contextlib.suppress(FastsplitError):
                    self._truncate(length, wait=False)
            elif self._finalizer is not None:
                self._session = None
                self._finalizer()
            raise


class SplitModelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal LM whose linear algebra is done by an executor at the other end of a channel.

    Made by `connect`. A context manager: leaving it closes the connection. Logits are on the CPU, float32 whatever the
    executor computes in, and the caller's own. It is for inference: `train()` is refused, and nothing has a gradient.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, config: PreTrainedConfig, runner: Runner, channel: Channel, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.channel = channel
        self.runner = runner
        self._dtype = dtype
        self._sessions = _Sessions(runner)
        self.train(False)

    @classmethod
    def connect(
        cls,
        uri: str,
        model_dir: str | Path,
        *,
        plan: str = "auto",
        trusted: bool = True,
        timeout_s: float = 10.0,
        call_timeout_s: float | None = 300.0,
        threads: int | None = None,
        tee_dtype: str | None = None,
        wire_dtype: str | None = None,
        lanes: int | None = None,
        cast: str = "auto",
        codec: str = "auto",
    ) -> SplitModelForCausalLM:
        """Connects to the GPU side at `uri`, which must serve the model in `model_dir`.

        `model_dir`: a Hugging Face directory, or `random:PRESET[@SEED]`. With `trusted` its configuration and norm
        weights are what counts, and the executor's must be the same; without, only config.json and
        generation_config.json are read, and norm weights are taken from the executor unchecked. `tee_dtype` and
        `wire_dtype`: as for `Runner`. `plan`, `lanes` and `cast` ("auto", "off", "bfloat16", "float16"): as for
        `choice.choose`; what is left to it is chosen for the link, which is measured now, and for prompts of a typical
        length. `runner.choice` has the reasons. `codec`: as for `fastsplit.connect`. `timeout_s` is for connecting,
        `call_timeout_s` for each call. `threads`: torch's, for the whole process.

        Raises ModelError for a directory that cannot be used, VerificationError where the executor's model is another
        one, ConnectError if nobody listens.
        """
        spec = str(model_dir)
        model = open_model(spec) if trusted or spec.startswith("random:") else None
        config, generation_config = _configs(spec, None if model is None else model.config.to_hf())
        channel = Channel(
            uri,
            arrays="torch",
            timeout_s=timeout_s,
            call_timeout_s=call_timeout_s,
            codec=codec,
            overlap=may_overlap(uri, lanes),
        )
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                remote = RemoteModel.fetch(channel, model if trusted else None)
                share_cores(channel, remote)
                if remote.config.vocab_size != config.get_text_config().vocab_size:
                    raise VerificationError(
                        f"the executor's model has {remote.config.vocab_size} tokens, that in {spec!r} "
                        f"{config.get_text_config().vocab_size}"
                    )
                choice = choose(
                    remote.config,
                    remote.dtype,
                    link=look(channel, call_timeout_s),
                    shm=channel.shm,
                    near=channel.near,
                    threads=remote.threads,
                    plan=plan,
                    lanes=lanes,
                    cast=cast,
                    wire_dtype=wire_dtype,
                )
                runner = Runner(remote, channel, tee_dtype=tee_dtype, wire_dtype=wire_dtype, choice=choice)
            split = cls(config, runner, channel, getattr(torch, remote.dtype))
        except BaseException:
            channel.close()
            raise
        if generation_config is not None:
            split.generation_config = generation_config
        return split

    def close(self) -> None:
        """Closes the connection, with which all sessions end; idempotent."""
        self.channel.close()

    def __enter__(self) -> SplitModelForCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """The CPU: where ids are taken and logits given."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What the executor computes in; logits are float32."""
        return self._dtype

    def extra_repr(self) -> str:
        return f"{self.channel.uri!r}, plan={self.runner.plan!r}"

    def train(self, mode: bool = True) -> SplitModelForCausalLM:
        """Raises NotImplementedError for training: gradients do not come back from the executor."""
        if mode:
            raise NotImplementedError("a split model is for inference: it has no gradients and cannot be trained")
        super().train(False)
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> SplitModelForCausalLM:
        """Raises NotImplementedError: `connect` makes a split model."""
        raise NotImplementedError(f"{cls.__name__} holds no weights: use {cls.__name__}.connect(uri, model_dir)")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: the weights are not here."""
        raise NotImplementedError("a split model holds no weights: there is nothing to save")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: continuous batching keeps pages of keys and values of its own."""
        raise NotImplementedError("continuous batching is not supported by a split model: use generate")

    def new_cache(self, expected: int | None = None) -> SplitCache:
        """An empty cache for `past_key_values`. It grows; `expected`: how many positions there will be at most, so that
        it takes no more memory than these need."""
        return SplitCache(self._sessions, expected)

    def get_output_embeddings(self) -> Any:
        """Raises NotImplementedError: the weights are not here. (For an assistant with another vocabulary transformers
        prunes its lm_head.)"""
        raise NotImplementedError("a split model has no output embeddings: they are on the executor")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin.generate. A cache that it made and does not return is closed on the executor.

        Raises SettingError by name, before anything is computed, for what a split model does not support: from the
        call, from a GenerationConfig, from generation_config.json.
        """
        given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        for name in _UNSUPPORTED:
            settings = (
                getattr(given.get("generation_config"), name, None),
                getattr(self.generation_config, name, None),
            )
            _refuse(name, given[name] if name in given else next(filter(_is_given, settings), None))
        try:
            mixin: Any = super()
            with _cpu_by_default():
                result = mixin.generate(*args, **kwargs)
        except BaseException:
            self._sessions.close_abandoned(wait=False)
            raise
        self._sessions.close_abandoned()
        return result

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: TransformersCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the new tokens, after what is in the cache.

        `input_ids`: [batch, n] integers. `attention_mask`: [batch, cached + n], 0 where a token is padding, on either
        side; None: no padding. `position_ids`: [batch or 1, n]; None: cached, cached + 1, ... as in transformers, also
        with padding on the left. `past_key_values`: a SplitCache of this model, which grows by n; None: a new one, or
        none at all without `use_cache`. `logits_to_keep`: as for any causal LM of transformers. `labels`: [batch, n],
        for a loss without gradients. `return_dict`: False for a tuple.

        Gives `logits` [batch, kept, vocab] float32, `loss` with labels, and `past_key_values`. What is given for
        padding means nothing. Raises SettingError or TypeError for an input that is not supported, and what the channel
        raises.
        """
        return_dict = kwargs.pop("return_dict", None)  # no parameter: `generate` must not take it for an input
        _refuse_unsupported(inputs_embeds, self.config, kwargs)
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
            found = "none" if input_ids is None else list(input_ids.shape)
            raise SettingError(f"input_ids: {found}, expected [batch, n], one token or more")
        _refuse_fractions("input_ids", input_ids)
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.new_cache()
        if cache is not None and not (isinstance(cache, SplitCache) and cache._sessions is self._sessions):
            kind = "of another model" if isinstance(cache, SplitCache) else f"a {type(cache).__name__}"
            raise TypeError(
                f"past_key_values: {kind}, expected the SplitCache that this model gave or new_cache() gives"
            )
        with torch.inference_mode(), self._sessions.lock:
            self._sessions.close_abandoned(wait=False)
            logits = self._run(input_ids, attention_mask, position_ids, cache, logits_to_keep)
        # Outside of inference mode: processors and users may change it in place.
        with torch.no_grad(), _cpu_by_default():
            logits = logits.clone()
            loss = None
            if labels is not None:
                options = {name: kwargs[name] for name in _LOSS_OPTIONS if name in kwargs}
                vocab_size = self.config.get_text_config().vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: SplitCache | None,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor:
        batch, rows = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None and past and cache.batch_size != batch:
            raise SettingError(f"input_ids: {batch} sequences, those in past_key_values are {cache.batch_size}")
        ids = input_ids.to("cpu", torch.int64)
        mask = _mask(attention_mask, batch, past + rows)
        if mask is None and cache is not None and cache._hides_padding:
            mask = torch.ones(
                batch, past + rows, dtype=torch.bool, device="cpu"
            )  # by default the runner goes on hiding it
        positions = _positions(position_ids, batch, past, rows, mask is not None)
        if cache is None and attention_mask is None and positions is not None and bool((positions.diff() != 1).any()):
            raise SettingError(
                "position_ids: not one after the other, which without a cache and a mask means sequences packed into "
                "one; not supported by a split model"
            )
        keep, before = _keep(logits_to_keep, batch, rows)
        distinct = None if past or batch == 1 else _distinct(ids, mask, positions, keep)
        if distinct is not None:
            first = distinct[0]
            ids, mask, positions = ids[first], _at(mask, first), _at(positions, first)
            keep = keep if isinstance(keep, str) else keep[first]
        with contextlib.ExitStack() as stack:
            if cache is not None:
                stack.enter_context(cache._unchanged_by_failure())
                session = cache._open(len(ids), rows)
            else:
                session = stack.enter_context(self.runner.new_cache(batch=len(ids), capacity=rows))
            if before:
                self.runner.forward(
                    ids[:, :before],
                    session,
                    mask=_at(mask, (..., slice(past + before))),
                    positions=_at(positions, (..., slice(before))),
                    keep="last",
                )
                ids, positions = ids[:, before:], _at(positions, (..., slice(before, None)))
            logits = self.runner.forward(ids, session, mask=mask, positions=positions, keep=keep)
            if distinct is not None:
                logits = logits[distinct[1]]
                if cache is not None:
                    session.reorder(distinct[1])
        return logits if isinstance(logits_to_keep, int) else _select(logits, logits_to_keep, keep)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TransformersCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """GenerationMixin's, without keywords that are for `generate` alone, and for Phi-3 what its own class does: it
        starts anew where its rotary embedding changes from short to long."""
        if self.config.model_type == "phi3" and past_key_values is not None:
            short = getattr(self.config, "original_max_position_embeddings", None)
            if short is not None and past_key_values.get_seq_length() <= short < input_ids.shape[1]:
                past_key_values = next_sequence_length = None
        mixin: Any = super()
        inputs: dict[str, Any] = mixin.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{name: value for name, value in kwargs.items() if name not in _GENERATES_OWN},
        )
        return inputs

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """GenerationMixin's, without its reminder of max_position_embeddings, which comes after a step beyond them: the
        runner has warned before."""
        mixin: Any = super()
        criteria = mixin._get_stopping_criteria(generation_config, stopping_criteria, *args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria) and criterion not in (stopping_criteria or ()):
                criterion.max_position_embeddings = None
        return criteria

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length)
            return None
        mixin: Any = super()
        return mixin._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _cpu_by_default() -> contextlib.AbstractContextManager[object]:
    """For transformers' own code, which makes tensors on torch's default device: ours are on the CPU."""
    # entered only where it matters: each of torch's functions is slower in such a context
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _configs(spec: str, values: dict[str, Any] | None) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """The configurations that from_pretrained would use; nothing is looked up outside of the directory, and no code of
    the model's own is run. `values`: the configuration of a `random:` model."""
    if spec.startswith("random:"):
        assert values is not None
        return AutoConfig.for_model(**values, attn_implementation="eager"), None
    directory = Path(spec)
    if not (directory / "config.json").is_file():
        raise ModelError(f"model {spec!r}: no config.json there")
    settings: dict[str, Any] = {"local_files_only": True}
    if not (directory / "generation_config.json").is_file():
        settings.update(config_file_name="config.json", _from_model_config=True)
    try:
        config = AutoConfig.from_pretrained(spec, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = "eager"  # whatever config.json says: there is no attention here to choose
        return config, GenerationConfig.from_pretrained(spec, **settings)
    except Exception as error:  # noqa: BLE001 (a file of an odd shape fails wherever transformers looks into it)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"model {spec!r}: {text}") from None


def _refuse_unsupported(inputs_embeds: torch.Tensor | None, config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    defaults = {name: getattr(config, name, None) for name in ("output_attentions", "output_hidden_states")}
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name, value in {**defaults, **given, "inputs_embeds": inputs_embeds}.items():
        _refuse(name, value)
    # cache_position: what generate of the first 5.x passes; it is where the cache ends. output_router_logits: for
    # mixtures of experts. HF's models of the families that there are here ignore both.
    known = {*_UNSUPPORTED, "cache_position", "output_router_logits", *_LOSS_OPTIONS}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: not supported by a split model")


def _refuse(name: str, value: Any) -> None:
    is_refused, reason = _UNSUPPORTED.get(name, (None, ""))
    if is_refused is not None and is_refused(value):
        shown = f"{value!r:.60}, " if isinstance(value, (str, int, float)) and value is not True else ""
        raise SettingError(f"{name}: {shown}not supported by a split model, {reason}")


def _refuse_fractions(name: str, numbers: torch.Tensor) -> None:
    if numbers.is_floating_point() or numbers.is_complex():
        raise SettingError(f"{name}: {numbers.dtype}, expected integers")


def _mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """[batch, length] bool, None if nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise SettingError(
            f"attention_mask: {list(attention_mask.shape)}, expected {[batch, length]}: all tokens, those in the cache "
            "too"
        )
    mask = attention_mask.to("cpu") != 0
    return None if bool(mask.all()) else mask


def _positions(
    position_ids: torch.Tensor | None, batch: int, past: int, rows: int, masked: bool
) -> torch.Tensor | None:
    """[batch, rows] int64; None where the runner would count the same ones by itself."""
    counted = int64_range(past, past + rows)
    if position_ids is None:
        return counted.repeat(batch, 1) if masked else None
    if position_ids.shape not in ((batch, rows), (1, rows)):
        raise SettingError(f"position_ids: {list(position_ids.shape)}, expected {[batch, rows]} or {[1, rows]}")
    _refuse_fractions("position_ids", position_ids)
    positions = position_ids.to("cpu", torch.int64)
    if int(positions.min()) < 0:
        raise SettingError(f"position_ids: {int(positions.min())}, expected 0 or more")
    if not masked and bool((positions == counted).all()):
        return None
    return positions.expand(batch, rows).contiguous()


def _keep(logits_to_keep: int | torch.Tensor, batch: int, rows: int) -> tuple[str | torch.Tensor, int]:
    """What to ask the runner for, and how many tokens to run before without asking for theirs."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise SettingError(f"logits_to_keep: {logits_to_keep}, expected 0 or more")
        kept = min(logits_to_keep or rows, rows)
        return ("last", 0) if kept == 1 else ("all", rows - kept)
    if logits_to_keep.ndim not in (1, 2):
        raise SettingError(f"logits_to_keep: {list(logits_to_keep.shape)}, expected [positions] or [batch, positions]")
    if logits_to_keep.dtype == torch.bool or logits_to_keep.shape[-1] != 1:
        return "all", 0
    chosen = logits_to_keep.to("cpu", torch.int64).reshape(-1).expand(batch)
    if not bool(((-rows <= chosen) & (chosen < rows)).all()):
        raise SettingError(f"logits_to_keep: {chosen.tolist()}, expected positions of {rows} tokens")
    return chosen % rows, 0


def _select(logits: torch.Tensor, logits_to_keep: torch.Tensor, keep: str | torch.Tensor) -> torch.Tensor:
    """Of all logits those that are asked for, as in transformers; if the runner was asked for them, they are it."""
    if isinstance(keep, torch.Tensor):
        return logits
    logits_to_keep = logits_to_keep.to("cpu")
    if logits_to_keep.ndim == 1:
        return logits[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return logits[logits_to_keep]
    return logits.take_along_dim(logits_to_keep[..., None], dim=1)


def _at(tensor: torch.Tensor | None, index: Any) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


def _distinct(*inputs: torch.Tensor | str | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which sequences [distinct] differ in any of the inputs [batch, ...], and which of them each one is, [batch]; None
    if all do."""
    tensors = [item.to(torch.int64).reshape(len(item), -1) for item in inputs if isinstance(item, torch.Tensor)]
    seen: dict[bytes, int] = {}
    rows = torch.cat(tensors, dim=1)
    which = [seen.setdefault(row.numpy().tobytes(), len(seen)) for row in rows]
    if len(seen) == len(which):
        return None
    first = [which.index(sequence) for sequence in range(len(seen))]
    return int64(first), int64(which)
