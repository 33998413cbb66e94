"""Arguments of `generate` and `forward` that a split model refuses, and the reasons.

Rules. An argument of transformers either gives HF's own tokens and logits or is refused by name, before anything is
computed. tests/e2e/test_generate_keywords.py tries every argument that transformers documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SettingError
from ..extras import torch, transformers  # noqa: F401 (first: a missing one raises an error that says how to get it)

# isort: split
from transformers import GenerationMixin, PreTrainedConfig

__all__ = [
    "LOSS_OPTIONS",
    "UNSUPPORTED",
    "refuse_generate_settings",
    "refuse_unsupported",
    "without_generate_keywords",
]

LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Keywords of `forward` that go to the loss function."""

_GENERATE_KEYWORDS = {*inspect.signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"}
"""Keywords of `generate` alone. Some modes pass them on to `forward`, where HF's models ignore them."""


def _is_given(value: Any) -> bool:
    return value is not None


_NOTHING_OF_A_LAYER = (bool, "which keeps nothing of a layer")
_ONE_SEQUENCE_A_ROW = (_is_given, "where each row of a batch is one sequence")
_CODE_ELSEWHERE = "which runs no code of a repository, and transformers has this mode only there"

UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
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
"""Argument -> (which values are refused, why). Other values of it give HF's own tokens and logits."""


def refuse_unsupported(inputs_embeds: torch.Tensor | None, config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> None:
    """Checks the arguments of a `forward`. Raises SettingError for refused values, TypeError for unknown keywords."""
    defaults = {name: getattr(config, name, None) for name in ("output_attentions", "output_hidden_states")}
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name, value in {**defaults, **given, "inputs_embeds": inputs_embeds}.items():
        _refuse(name, value)
    # cache_position: `generate` of the first 5.x passes it; it equals the cache's length. output_router_logits: for
    # mixtures of experts. HF's models of the families here ignore both.
    known = {*UNSUPPORTED, "cache_position", "output_router_logits", *LOSS_OPTIONS}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: not supported by a split model")


def refuse_generate_settings(given: Mapping[str, Any], own_config: object) -> None:
    """Checks the settings of a `generate`. Raises SettingError for a refused value.

    `given`: the call's arguments. A setting comes from there, else from the call's `generation_config`, else from
    `own_config`, the model's.
    """
    for name in UNSUPPORTED:
        if name in given:
            value = given[name]
        else:
            settings = (getattr(config, name, None) for config in (given.get("generation_config"), own_config))
            value = next(filter(_is_given, settings), None)
        _refuse(name, value)


def without_generate_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that are for `forward`."""
    return {name: value for name, value in kwargs.items() if name not in _GENERATE_KEYWORDS}


def _refuse(name: str, value: Any) -> None:
    is_refused, reason = UNSUPPORTED.get(name, (None, ""))
    if is_refused is not None and is_refused(value):
        shown = f"{value!r:.60}, " if isinstance(value, (str, int, float)) and value is not True else ""
        raise SettingError(f"{name}: {shown}not supported by a split model, {reason}")
