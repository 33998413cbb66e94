"""A checkpoint: which files of a Hugging Face directory hold the weights, and under which names.

Rules. What transformers' from_pretrained loads is the truth; the functions below say where its rules are. Where it
would load something that is not read here (another format, an adapter on top, random numbers for a weight that is
missing) the checkpoint is refused, with the reason. A weight is looked up and checked here alone, whichever side reads
it: the executor all of them, a TEE side those of its trusted copy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["EMBEDDING", "LM_HEAD", "Checkpoint", "Part", "read_json"]

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The two that a model may have tied to each other."""

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NOT_READ = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"
_DISTRIBUTED = "shard-#-model-#-of-#.safetensors".replace("#", 5 * "[0-9]")
_PREFIX = "model."
"""What the base model's weights have before their own names (`base_model_prefix`)."""
_DTYPES = ("F64", "F32", "F16", "BF16")
"""What weights may be stored as, in safetensors' names: numbers that mean themselves, cast to what is computed in."""


@dataclass(frozen=True)
class Part:
    """Where in a checkpoint a weight lies: `count` rows of the weight `name` from `start` on, which has `rows`."""

    name: str
    start: int
    count: int
    rows: int


class Checkpoint:
    """The weights in a directory. Files are looked for when it is made, headers are read with the first weight, and of
    a weight only the rows that are asked for."""

    def __init__(self, directory: Path, names: Collection[str], *, tied: bool, file: Any = None) -> None:
        """`names`: what the model's weights are called in transformers. `tied`: whether the configuration ties the
        lm_head to the embedding. `file`: the configuration's `transformers_weights`. Raises ModelError."""
        self._directory = directory
        self._names = {*names, EMBEDDING, LM_HEAD}
        self._tied = tied
        self._files = _files(directory, file)

    @property
    def has_lm_head(self) -> bool:
        """Whether there is an lm_head of its own. Where the configuration says tied, transformers uses it all the same
        (and ties where the two are equal, which changes no number)."""
        places = self._places
        return LM_HEAD in places and places[LM_HEAD] != places.get(EMBEDDING)

    def load(self, part: Part, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight's rows, on the CPU, as they are stored; `shape`: of these rows. Raises ModelError."""
        from ..extras import torch

        place = self._places.get(part.name)
        if place is None:
            files = ", ".join(file.name for file in self._files[:3]) + (", ..." if len(self._files) > 3 else "")
            raise ModelError(
                f"{self._directory}: weight {part.name!r} missing in {files}; transformers makes random numbers for it"
            )
        file, key = place
        # said here, since safetensors makes tensors on torch's default device
        with torch.device("cpu"), _opened(file, f"weight {key!r}") as weights:
            stored = weights.get_slice(key)
            if stored.get_dtype() not in _DTYPES:
                raise ModelError(
                    f"{file}: weight {key!r} of dtype {stored.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                )
            found, expected = tuple(stored.get_shape()), (part.rows, *shape[1:])
            if found != expected:
                raise ModelError(f"{file}: weight {key!r} of shape {list(found)}, expected {list(expected)}")
            tensor: torch.Tensor = stored[part.start : part.start + part.count]
            return tensor

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """For each weight that is there its file, and its name in it.

        As in transformers' `_load_pretrained_model`: all that the files hold counts, whatever an index says about it,
        and of two files the later one. Then, as in its `tie_weights`: of two that are tied the one that is missing is
        the other one.
        """
        keys: dict[str, Path] = {}
        for file in self._files:
            with _opened(file, "header") as weights:
                keys.update(dict.fromkeys(weights.keys(), file))
        places: dict[str, tuple[Path, str]] = {}
        for key, file in keys.items():
            name = self._name_of(key)
            if name in places:
                raise ModelError(f"{self._directory}: {places[name][1]!r} and {key!r} are both the weight {name!r}")
            if name in self._names:
                places[name] = file, key
        if self._tied:
            for missing, other in ((EMBEDDING, LM_HEAD), (LM_HEAD, EMBEDDING)):
                if missing not in places and other in places:
                    places[missing] = places[other]
        return places

    def _name_of(self, key: str) -> str:
        """The model's name for what a file calls `key`: with the prefix or without, as in transformers'
        `rename_source_key`, which takes any character for the prefix's dot."""
        if key.startswith(_PREFIX[:-1]) and key[len(_PREFIX) :] in self._names:
            return key[len(_PREFIX) :]
        return _PREFIX + key if _PREFIX + key in self._names else key


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None if there is no such file. Raises ModelError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a {type(values).__name__}, expected a JSON object")
    return values


def _files(directory: Path, file: Any) -> list[Path]:
    """The files with weights, in the order in which transformers reads them (`_get_resolved_checkpoint_files`)."""
    model = f"model {str(directory)!r}"
    if (directory / _ADAPTER).is_file():
        raise ModelError(
            f"{model}: {_ADAPTER} in it, an adapter that transformers puts on top where peft is installed; expected "
            "merged weights and no such file"
        )
    distributed = next(directory.glob(_DISTRIBUTED), None)
    if distributed is not None:
        raise ModelError(
            f"{model}: {distributed.name} in it, of a distributed checkpoint, expected {_WHOLE} or its index"
        )
    if file is not None and not (isinstance(file, str) and file.endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(f"config, transformers_weights: {file!r}, expected a file of safetensors or an index of them")
    if file is None:
        file = next((name for name in (_WHOLE, _INDEX) if (directory / name).is_file()), None)
    if file is None:
        other = next((f"; {name}, which is not read" for name in _NOT_READ if (directory / name).is_file()), "")
        raise ModelError(f"{model}: neither {_WHOLE} nor its index in it{other}")
    if file.endswith(".safetensors"):
        return [_beside(directory / "config.json", file)]
    index = _beside(directory / "config.json", file)
    shards = (read_json(index) or {}).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: no weight_map in it")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: weight {name!r} in {shard!r}, expected a file of safetensors")
    return [_beside(index, shard) for shard in sorted(set(shards.values()))]


def _beside(path: Path, file: str) -> Path:
    """The file that `path` names, in its own directory. Raises ModelError."""
    if Path(file).name != file:
        raise ModelError(f"{path}: it names {file!r}, expected a file in this directory")
    found = path.parent / file
    if not found.is_file():
        raise ModelError(f"{path}: it names {file!r}, which is not there")
    return found


@contextlib.contextmanager
def _opened(file: Path, what: str) -> Iterator[Any]:
    from ..extras import safetensors

    try:
        with safetensors.safe_open(file, "pt") as weights:
            yield weights
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file}: {what}: {error}") from None
