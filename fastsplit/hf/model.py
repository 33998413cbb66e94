"""SplitModelForCausalLM: transformers' own `generate` over a `forward` that a Runner computes.

Rules. The model holds no weights: configuration and generation settings come from the directory, norm weights belong to
the runner. Sequences of a prompt that are equal (beams, `num_return_sequences`) are run once and then repeated. A call
that fails leaves the cache unchanged. Calls from several threads take turns.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from types import TracebackType
from typing import Any

from ..extras import torch, transformers  # noqa: F401 (first: a missing one raises an error that says how to get it)

# isort: split
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ModelError, SettingError, VerificationError
from ..models import open_model
from ..tee.open import open_split
from ..tee.remote import RemoteModel
from ..tee.runner import Runner
from ..wire.blocking.channel import Channel
from .cache import CacheRegister, SplitCache
from .inputs import (
    at,
    check_ids,
    distinct_sequences,
    parse_mask,
    parse_positions,
    select_logits,
    selected_rows,
)
from .refused import LOSS_OPTIONS, refuse_generate_settings, refuse_unsupported, without_generate_keywords

__all__ = ["SplitModelForCausalLM"]


class SplitModelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal LM whose linear algebra runs on an executor at the other end of a channel.

    Made by `connect`. A context manager that closes the connection. Logits are float32 on the CPU, for every dtype of
    the executor, and belong to the caller. For inference only: `train()` raises, and nothing has a gradient.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, config: PreTrainedConfig, runner: Runner, channel: Channel, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.channel = channel
        self.runner = runner
        self._dtype = dtype
        self._caches = CacheRegister(runner)
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

        `model_dir`: a Hugging Face directory, or `random:PRESET[@SEED]`. With `trusted` it is the trusted copy, whose
        configuration and norm weights the executor's must equal; without, only config.json and generation_config.json
        are read, and norm weights are taken from the executor unchecked. `plan`, `lanes`, `cast` ("auto", "off",
        "bfloat16", "float16"), `codec`, `tee_dtype`, `wire_dtype`, `timeout_s`, `call_timeout_s`: as for `open_split`,
        for prompts of a typical length. `runner.tuning` has the settings and their reasons. `threads`: torch's, for the
        whole process.

        Raises ModelError for an unusable directory, VerificationError if the executor's model is another one,
        ConnectError if nothing listens at `uri`, and what else `open_split` raises.
        """
        spec = str(model_dir)
        model = open_model(spec) if trusted or spec.startswith("random:") else None
        config, generation_config = _configs(spec, None if model is None else model.config.to_hf())

        def check(remote: RemoteModel) -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            vocab_size = config.get_text_config().vocab_size
            if remote.config.vocab_size != vocab_size:
                raise VerificationError(
                    f"the executor's model has {remote.config.vocab_size} tokens, that in {spec!r} {vocab_size}"
                )

        opened = open_split(
            uri,
            model if trusted else None,
            rows=check,
            plan=plan,
            lanes=lanes,
            cast=cast,
            codec=codec,
            tee_dtype=tee_dtype,
            wire_dtype=wire_dtype,
            timeout_s=timeout_s,
            call_timeout_s=call_timeout_s,
        )
        try:
            split = cls(config, opened.runner, opened.channel, getattr(torch, opened.model.dtype))
        except BaseException:
            opened.close()
            raise
        if generation_config is not None:
            split.generation_config = generation_config
        return split

    def close(self) -> None:
        """Closes the connection, and with it all KV caches. Idempotent."""
        self.channel.close()

    def __enter__(self) -> SplitModelForCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """The CPU, where ids and logits are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the executor's products; logits are float32."""
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
        """An empty cache for `past_key_values`, which grows. `expected`: the maximum number of positions, which limits
        the memory that is allocated at first."""
        return SplitCache(self._caches, expected)

    def get_output_embeddings(self) -> Any:
        """Raises NotImplementedError: the weights are not here. (For an assistant with another vocabulary transformers
        prunes its lm_head.)"""
        raise NotImplementedError("a split model has no output embeddings: they are on the executor")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin.generate. A cache that it makes and does not return is closed on the executor.

        Raises SettingError with the setting's name, before anything is computed, if a split model does not support it;
        settings come from the call, a GenerationConfig and generation_config.json.
        """
        given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        refuse_generate_settings({**given, **given.get("kwargs", {})}, self.generation_config)
        try:
            mixin: Any = super()
            with _cpu_by_default():
                result = mixin.generate(*args, **kwargs)
        except BaseException:
            self._caches.close_unused(wait=False)
            raise
        self._caches.close_unused()
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
        """Logits of the new tokens, which follow those in the cache.

        `input_ids`: [batch, n] integers. `attention_mask`: [batch, cached + n], 0 where a token is padding, on either
        side; None: no padding. `position_ids`: [batch or 1, n]; None: cached, cached + 1, ... as in transformers, also
        with padding on the left. `past_key_values`: a SplitCache of this model, which grows by n; None: a new one, or
        none at all without `use_cache`. `logits_to_keep`: as for any causal LM of transformers. `labels`: [batch, n],
        for a loss without gradients. `return_dict`: False for a tuple.

        Returns `logits` [batch, selected, vocab] float32, `loss` with labels, and `past_key_values`. Logits of padding
        are undefined. Raises SettingError or TypeError for an unsupported input, and what `Channel.call` raises.
        """
        return_dict = kwargs.pop("return_dict", None)  # no parameter: `generate` must not take it for an input
        refuse_unsupported(inputs_embeds, self.config, kwargs)
        input_ids = check_ids(input_ids)
        cache = self._cache_of(past_key_values, use_cache)
        with torch.inference_mode(), self._caches.lock:
            self._caches.close_unused(wait=False)
            logits = self._run(input_ids, attention_mask, position_ids, cache, logits_to_keep)
        # outside of inference mode: logits processors and users may change them in place
        with torch.no_grad(), _cpu_by_default():
            logits = logits.clone()
            loss = None
            if labels is not None:
                options = {name: kwargs[name] for name in LOSS_OPTIONS if name in kwargs}
                vocab_size = self.config.get_text_config().vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _cache_of(self, given: TransformersCache | None, use_cache: bool | None) -> SplitCache | None:
        """The cache of a `forward`: the given one, a new one, or None without `use_cache`. Raises TypeError for a cache
        that is not this model's."""
        if given is None:
            return self.new_cache() if (self.config.use_cache if use_cache is None else use_cache) else None
        if not (isinstance(given, SplitCache) and given._caches is self._caches):
            kind = "of another model" if isinstance(given, SplitCache) else f"a {type(given).__name__}"
            raise TypeError(
                f"past_key_values: {kind}, expected the SplitCache that this model gave or new_cache() gives"
            )
        return given

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
        mask = parse_mask(attention_mask, batch, past + rows)
        if mask is None and cache is not None and cache._has_padding:
            # without a mask the runner would go on masking the padding
            mask = torch.ones(batch, past + rows, dtype=torch.bool, device="cpu")
        positions = parse_positions(position_ids, batch, past, rows, mask is not None)
        if cache is None and attention_mask is None and positions is not None and bool((positions.diff() != 1).any()):
            raise SettingError(
                "position_ids: not one after the other, which without a cache and a mask means sequences packed into "
                "one; not supported by a split model"
            )
        keep, before = selected_rows(logits_to_keep, batch, rows)
        distinct = None if past or batch == 1 else distinct_sequences(ids, mask, positions, keep)
        if distinct is not None:
            first = distinct[0]
            ids, mask, positions = ids[first], at(mask, first), at(positions, first)
            keep = keep if isinstance(keep, str) else keep[first]
        with contextlib.ExitStack() as stack:
            if cache is not None:
                stack.enter_context(cache._unchanged_by_failure())
                kv_cache = cache._open(len(ids), rows)
            else:
                kv_cache = stack.enter_context(self.runner.new_cache(batch=len(ids), capacity=rows))
            if before:
                self.runner.forward(
                    ids[:, :before],
                    kv_cache,
                    mask=at(mask, (..., slice(past + before))),
                    positions=at(positions, (..., slice(before))),
                    keep="last",
                )
                ids, positions = ids[:, before:], at(positions, (..., slice(before, None)))
            logits = self.runner.forward(ids, kv_cache, mask=mask, positions=positions, keep=keep)
            if distinct is not None:
                logits = logits[distinct[1]]
                if cache is not None:
                    kv_cache.reorder(distinct[1])
        return select_logits(logits, logits_to_keep, keep)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TransformersCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """GenerationMixin's, without the keywords of `generate` alone. For Phi-3, as in its own class, the cache starts
        anew where the rotary embedding changes from short to long."""
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
            **without_generate_keywords(kwargs),
        )
        return inputs

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """GenerationMixin's, without its warning about max_position_embeddings: the runner warns earlier, and once."""
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
    """Makes the CPU torch's default device, on which transformers' own code makes tensors."""
    # only if needed: each of torch's functions is slower in such a context
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _configs(spec: str, values: dict[str, Any] | None) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """The configurations that from_pretrained would use. Only files of the directory are read, and none of the model's
    code runs. `values`: the configuration of a `random:` model."""
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
        config._attn_implementation = "eager"  # overrides config.json: no attention of transformers runs
        return config, GenerationConfig.from_pretrained(spec, **settings)
    except Exception as error:  # noqa: BLE001 (transformers raises anything for a malformed file)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"model {spec!r}: {text}") from None
