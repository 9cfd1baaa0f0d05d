"""What a folder says about its weights, before any memory is taken: headers of safetensors files, and JSON files."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

MAX_NUMBER = 10**6  # in the config of a scheduler, which makes lists as long as its number of timesteps
_DAMAGED = "it was cut off, damaged or not downloaded (git lfs pull): download or save it again."

_OTHER_ADAPTER = "the file is damaged, or the adapter is for another model."


class DamagedFileError(OSError):
    """A file of a pipeline is damaged, or does not go with the one beside it."""


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file, by the file's header."""

    shape: tuple[int, ...]
    is_floating_point: bool
    file: Path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    DamagedFileError
        The file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise DamagedFileError(f"{path} is not valid JSON ({error}): {_DAMAGED}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} holds a JSON {type(content).__name__}, expected an object: {_DAMAGED}")
    return content


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the names, shapes and kinds of the tensors in a safetensors file.

    Raises
    ------
    DamagedFileError
        The file is not whole, or its header does not fit what follows.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: StoredTensor(tuple(tensor.get_shape()), "F" in tensor.get_dtype(), path)
                for name, tensor in slices.items()
            }
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is no whole safetensors file ({error}): {_DAMAGED}") from error


def read_headers(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """Read the headers of the weights in a folder, in one file or in shards; nothing where there are none.

    Raises
    ------
    DamagedFileError
        As [`read_header`]; or the index of the shards is damaged, or names a shard that is missing.
    """
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    name = f"{stem}.{variant}.{suffix}" if variant else SAFETENSORS_WEIGHTS_NAME
    index = folder / (f"{stem}.{suffix}.index.{variant}.json" if variant else f"{SAFETENSORS_WEIGHTS_NAME}.index.json")
    if not index.is_file():
        return read_header(folder / name) if (folder / name).is_file() else {}
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise DamagedFileError(f"{index} has no weight_map from the names of weights to files: {_DAMAGED}")
    headers: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise DamagedFileError(
                f"{folder / shard} is missing, which {index.name} names: download or save the model again."
            )
        headers |= read_header(folder / shard)
    return headers


def check_weights(model_class: Any, folder: Path, variant: str | None = None) -> None:
    """Compare a model's config with the headers of its weights, before the model takes memory.

    Parameters
    ----------
    model_class
        Class of the model; its `leading_shapes(**config)` gives the shapes of some weights, which together bound all
        sizes in a config.
    folder
        Holds the config and the weights. Without the latter nothing is checked.
    variant
        Part of the names of the weights, such as "fp16".

    Raises
    ------
    DamagedFileError
        A file is damaged, or the config asks for other weights than are there; names the file and both shapes.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        return
    config = read_json(config_file)
    stored = read_headers(folder, variant)
    if not stored or config.get("quantization_config"):  # packed weights have shapes of their own
        return
    parameters = inspect.signature(model_class).parameters
    settings = {name: config.get(name, parameter.default) for name, parameter in parameters.items()}
    try:
        _compare(model_class.leading_shapes(**settings), stored, config_file)
        with init_empty_weights():
            model = model_class.from_config(config)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{config_file} describes no {model_class.__name__}: {error}") from error
    expected = model.state_dict()
    _compare({name: tuple(tensor.shape) for name, tensor in expected.items()}, stored, config_file)
    some_file = next(iter(stored.values())).file
    if surplus := sorted(stored.keys() - expected.keys()):
        raise DamagedFileError(
            f"{some_file} holds {len(surplus)} weights that {config_file.name} does not ask for, such as "
            f"{surplus[0]}: one of the two is damaged or of another model."
        )
    for name, tensor in expected.items():
        if stored[name].is_floating_point != tensor.is_floating_point():
            raise DamagedFileError(
                f"{stored[name].file} holds {name} as another kind of number than {tensor.dtype}: {_DAMAGED}"
            )


def _compare(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], config_file: Path) -> None:
    """Raise DamagedFileError for weights that are missing or have another shape."""
    some_file = next(iter(stored.values())).file
    if missing := sorted(expected.keys() - stored.keys()):
        raise DamagedFileError(
            f"{some_file} lacks {len(missing)} weights, such as {missing[0]}, that {config_file.name} asks for: one of "
            "the two is damaged, or of another version of scrdit_diffusers than the one installed."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise DamagedFileError(
                f"{stored[name].file} holds {name} of shape {stored[name].shape}, but {config_file.name} asks for "
                f"{shape}: one of the two is damaged or of another model."
            )


def check_adapter(model: nn.Module, weights: Mapping[str, torch.Tensor], prefix: str | None) -> None:
    """Raise ValueError unless LoRA weights are whole and fit a model; the loader leaves out those that do not.

    Parameters
    ----------
    model
        The model that the adapter goes into.
    weights
        Those of the adapter, by name.
    prefix
        What the names start with, without the dot; `None` or empty: nothing.
    """
    prefix = f"{prefix}." if prefix else ""
    modules = dict(model.named_modules())
    adapter = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not adapter:
        raise ValueError(
            f"No LoRA weight is named {prefix}..., such as {next(iter(weights), 'none')}: {_OTHER_ADAPTER}"
        )
    for name, tensor in adapter.items():
        for side, other, axis, features in (("A", "B", 1, "in_features"), ("B", "A", 0, "out_features")):
            if not name.endswith(f".lora_{side}.weight"):
                continue
            layer = modules.get(name.removesuffix(f".lora_{side}.weight"))
            size = getattr(layer, features, None)
            pair = adapter.get(name.replace(f".lora_{side}.", f".lora_{other}."))
            if pair is None or tensor.ndim != 2 or tensor.shape[axis] != size or not tensor.is_floating_point():
                raise ValueError(
                    f"The LoRA weight {prefix}{name} of shape {tuple(tensor.shape)} has no counterpart or no place in "
                    f"this model, where {features} is {size}: {_OTHER_ADAPTER}"
                )


def check_scheduler_config(path: Path) -> None:
    """Raise DamagedFileError for the config of a scheduler that is damaged or of an absurd size."""
    for name, number in read_json(path).items():
        if isinstance(number, (int, float)) and not abs(number) <= MAX_NUMBER:
            raise DamagedFileError(f"{path} has {name}={number}, expected at most {MAX_NUMBER:,}: {_DAMAGED}")
