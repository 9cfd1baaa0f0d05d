"""Loading and publishing: safetensors only, access checked before any work, errors that say what to do."""

import functools
import importlib
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import OffloadedWeightsLoader
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError is that of its HTTP library
from safetensors import SafetensorError

from .atomic import LOCK_NAME, write_into
from .stored_weights import DamagedFileError, check_adapter, check_scheduler_config, check_weights, read_json

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAFETENSORS_ONLY = (
    "Weights are read from safetensors files only, because unpickling can run any code: ask the author for such a file."
)
_LOG_IN = "log in by `hf auth login` or pass token=..., with a token that may write"
_ADVICE = {
    401: f"The Hub does not know the token, or there is none: {_LOG_IN}.",
    403: (
        f"The account may not write there: choose a repository of your own or of your organization, or {_LOG_IN}; "
        "or the storage quota is exceeded (see the response below)."
    ),
    404: f"There is no such repository, or the account may not see it: {_LOG_IN}.",
}


@contextmanager
def explain_push(repo_id: str, kept: str = "") -> Iterator[None]:
    """Turn errors of publishing inside the block into an OSError that says what to do.

    Parameters
    ----------
    repo_id
        Repository to write to.
    kept
        What was saved and how to publish it later; ends the message.

    Raises
    ------
    OSError
        The Hub refused or cannot be reached; the message names the repository and the likely cause.
    """
    try:
        yield
    except (HTTPError, OSError) as error:  # an HTTPError need not be an OSError
        response = getattr(error, "response", None)
        advice = "Is there a network, and does the Hub answer? Then push again."
        if response is not None:
            advice = _ADVICE.get(response.status_code, f"The Hub answered {response.status_code}; push again later.")
        says = f"(The library says: {' '.join(str(error).split())})"
        raise OSError(" ".join(filter(None, [f"Could not push to {repo_id}.", advice, kept, says]))) from error


def prepare_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a model repository if there is none, and check that the token may write to it.

    `create_repo` alone would accept somebody else's repository.

    Parameters
    ----------
    repo_id
        Its id, or a name in the token's account.
    private
        Make a new repository private; `None` takes the account's default.
    token
        Token for the Hub; the stored one if `None`.

    Returns
    -------
    The full id.

    Raises
    ------
    OSError
        The repository cannot be written to; see [`explain_push`].
    """
    api = HfApi(token=token)
    with explain_push(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    return repo_id


def upload_pipeline(
    folder: str,
    repo_id: str,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    logging_dir: str = "logs",
) -> str:
    """Upload a pipeline folder without its training checkpoints and logs; return the URL of the commit."""
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message,
        create_pr=create_pr,
        ignore_patterns=["checkpoint-*", "checkpoint-*/*", f"{logging_dir}/*", LOCK_NAME],
    )


@contextmanager
def load_safely(source: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep a diffusers loader inside the block from falling back to pickled files, and make its errors clear.

    Parameters
    ----------
    source
        Folder, file or repository to load, or a state dict.
    kwargs
        The other arguments of the loader.

    Yields
    ------
    `kwargs` with `use_safetensors=True`.

    Raises
    ------
    ValueError
        The arguments ask for a pickled file.
    OSError
        There are no safetensors, the download broke off, or the repository cannot be reached; the message says what
        to check.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False would unpickle weights. {_SAFETENSORS_ONLY}")
    for name in (kwargs.get("weight_name"), None if isinstance(source, dict) else source):
        if name is not None and Path(str(name)).suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{name} is a pickled file. {_SAFETENSORS_ONLY}")
    is_here = not isinstance(source, (str, Path)) or os.path.exists(source)
    here = "" if is_here else "There is no such folder here, so it was sought on the Hub. "
    try:
        yield kwargs | {"use_safetensors": True}
    except HFValidationError as error:
        raise OSError(f"{source} is neither a folder here nor the name of a repository, such as user/name.") from error
    except (DamagedFileError, PermissionError):
        raise
    except OSError as error:
        if isinstance(source, (str, Path)) and any(Path(source).glob("checkpoint-*")) and "model_index" in str(error):
            raise OSError(
                f"{source} holds no pipeline yet, but checkpoints of a training run: continue with "
                "scrdit train --resume_from_checkpoint latest and its other arguments."
            ) from error
        if isinstance(source, (str, Path)) and Path(source).is_dir() and "model_index" in str(error):
            raise OSError(
                f"{source} holds no pipeline: it has no model_index.json, which training writes at its end. ({error})"
            ) from error
        if "safetensors" in str(error) and _SAFETENSORS_ONLY not in str(error):
            raise OSError(f"{error} {_SAFETENSORS_ONLY}") from error
        if "cached" in str(error) or str(source) not in str(error):  # the message does not say what was to be loaded
            revision = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise OSError(
                f"Could not load {source}{revision}. {here}Is the name right, does the revision exist, may your token "
                f"read it (`hf auth login`, or token=...), is there a network? The library says: {error}"
            ) from error
        raise
    except HTTPError as error:  # not an OSError, and names neither the repository nor what to do
        raise OSError(f"Loading {source} broke off ({error}). {here}Load it again: whole files are kept.") from error
    except SafetensorError as error:
        raise OSError(
            f"The safetensors file of {source} is damaged or of another kind ({error}): download or save it again."
        ) from error
    except ValueError as error:
        if isinstance(source, dict) or str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except (AttributeError, KeyError, ModuleNotFoundError, NotImplementedError, RecursionError, TypeError) as error:
        raise OSError(
            f"Nothing can be made of {source} with these arguments ({type(error).__name__}: {error}): one of its JSON "
            "files is damaged or of another version, or an argument is wrong."
        ) from error


def saving_folder(save_directory: str | Path, kwargs: dict[str, Any]) -> str:
    """Return the folder as a string, from which diffusers takes the name of the repository.

    Raises
    ------
    ValueError
        The arguments ask for pickled weights.
    """
    if kwargs.get("safe_serialization") is False:
        raise ValueError("safe_serialization=False would write pickled weights, which are never loaded; leave it out.")
    return str(Path(save_directory))


def make_readable(folder: str | Path) -> None:
    """Give saved weights the permissions of other new files; safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _local_folder(source: str | Path, kwargs: Mapping[str, Any]) -> Path | None:
    """Folder with the config and the weights of a model, downloaded if need be; `None` where it has no such file."""
    subfolder = kwargs.get("subfolder") or ""
    if Path(source).is_dir():
        return Path(source) / subfolder
    names = ("cache_dir", "local_files_only", "revision", "token")
    options = {name: kwargs[name] for name in names if name in kwargs} | dict(subfolder=subfolder or None)
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    try:
        hf_hub_download(str(source), f"{stem}{variant}.{suffix}", **options)
        return Path(hf_hub_download(str(source), "config.json", **options)).parent
    except (HFValidationError, HTTPError, OSError):  # which the loader of diffusers will run into and explain
        return None


def weights_last(folder: str | Path, variant: str | None = None) -> list[str]:
    """Name the files of a pipeline folder that a new pipeline must not find: its index, then weights of a variant."""
    part = r"(-\d{5}-of-\d{5})?"
    name = rf"diffusion_pytorch_model{part}\.safetensors|diffusion_pytorch_model\.safetensors\.index\.json"
    if variant:
        name = rf"diffusion_pytorch_model\.{re.escape(variant)}{part}\.safetensors"
        name += rf"|diffusion_pytorch_model\.safetensors\.index\.{re.escape(variant)}\.json"
    weights = sorted(path for path in Path(folder).glob("transformer/*") if re.fullmatch(name, path.name))
    return ["model_index.json", *(f"transformer/{path.name}" for path in weights)]


class SafeModelMixin:
    """Mixin for models, listed before `ModelMixin`: safetensors only, and errors that say what to do."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a model as `ModelMixin.from_pretrained` does, from safetensors only, with no weight missing.

        A `device_map` may put any part on "disk" (with `offload_folder`), but diffusers 0.42 fails if no part on the
        disk has weights, as with "norm_out" alone.

        Raises
        ------
        OSError
            A file is damaged, or the config asks for other weights than there are; found by their headers, before the
            model takes memory.
        """
        with load_safely(pretrained_model_name_or_path, kwargs) as kwargs:
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            if folder is not None and not kwargs.get("ignore_mismatched_sizes"):
                check_weights(cls, folder, kwargs.get("variant"))
            return_info = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
            if missing := sorted(info["missing_keys"]):  # in shards on the Hub, which are not compared before
                raise OSError(
                    f"{pretrained_model_name_or_path} lacks {len(missing)} weights, such as {missing[0]}: it is "
                    "damaged, or of another version of scrdit_diffusers than the one installed."
                )
            if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                # diffusers keeps the buffers of parts on the disk in memory, with the constructor's values.
                stored = OffloadedWeightsLoader(save_folder=kwargs["offload_folder"])
                for name, buffer in model.named_buffers():
                    if name in stored:
                        buffer.copy_(stored[name])
            return (model, info) if return_info else model  # type: ignore[return-value]  # as ModelMixin does

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its signature
    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model as `ModelMixin.save_pretrained` does, as safetensors only.

        Raises
        ------
        ValueError
            Weights are offloaded, or an adapter is loaded. Those that group offloading moved to disk would be saved as
            garbage, and those beside an adapter could not be loaded.
        OSError
            They cannot be written.
        """
        folder = saving_folder(save_directory, kwargs)
        offloaded = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]
        if offloaded or getattr(self, "_weights_on_disk", False):
            raise ValueError(
                "save_pretrained: the weights are offloaded; save before that, or load the model anew and save it."
            )
        if any(".base_layer." in name for name, _ in self.named_parameters()):  # type: ignore[attr-defined]
            raise ValueError(
                "A LoRA adapter is loaded, and weights saved with it could not be loaded again. Fuse it into them by "
                "pipe.fuse_lora(components=['transformer']) and pipe.unload_lora_weights(), or take it out by the "
                "second alone; save_lora_weights() saves it."
            )
        with explain_push(kwargs.get("repo_id") or folder) if kwargs.get("push_to_hub") else nullcontext():
            try:
                super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
            except SafetensorError as error:
                raise OSError(f"Could not write the weights to {folder}: {error}") from error
        make_readable(folder)

    @functools.wraps(ModelMixin.to)
    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        if args == (None, self.dtype) and not kwargs:  # type: ignore[attr-defined]
            return self  # `DiffusionPipeline.from_pipe` casts to the same dtype, and diffusers would warn of it
        return super().to(*args, **kwargs)  # type: ignore[misc]

    @functools.wraps(ModelMixin.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as `ModelMixin.enable_group_offload` does, and remember if weights go to disk."""
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]
        given = inspect.signature(ModelMixin.enable_group_offload).bind(self, *args, **kwargs).arguments
        self._weights_on_disk = given.get("offload_to_disk_path") is not None

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Upload the model as `ModelMixin.push_to_hub` does; errors say what to do."""
        with explain_push(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any):
        """Load a LoRA adapter as `PeftAdapterMixin.load_lora_adapter` does, from safetensors only.

        Raises
        ------
        ValueError
            Weights in memory are not those of an adapter for this model.
        """
        with load_safely(pretrained_model_name_or_path_or_dict, kwargs) as kwargs:
            if isinstance(pretrained_model_name_or_path_or_dict, dict):
                prefix = kwargs.get("prefix", "transformer")
                check_adapter(self, pretrained_model_name_or_path_or_dict, prefix)  # type: ignore[arg-type]
            return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, **kwargs)  # type: ignore[misc]

    def save_lora_adapter(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save a LoRA adapter as `PeftAdapterMixin.save_lora_adapter` does, as safetensors only."""
        super().save_lora_adapter(saving_folder(save_directory, kwargs), **kwargs)  # type: ignore[misc]
        make_readable(save_directory)


# Every transformer-only model of diffusers has a LoRA mixin of its own; they differ only in name.
class SafePipelineMixin(CogVideoXLoraLoaderMixin):
    """Mixin for pipelines, listed before `DiffusionPipeline`: safetensors only, LoRA adapters and model cards."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline as `DiffusionPipeline.from_pretrained` does, from safetensors only.

        Parameters
        ----------
        pretrained_model_name_or_path
            Folder, or id of a repository on the Hub.
        **kwargs
            Those of `DiffusionPipeline.from_pretrained`: `revision`, `token`, `local_files_only`, `dtype`, ...

        Raises
        ------
        OSError
            The repository, revision or file does not exist, cannot be reached, or holds no safetensors.
        ValueError
            `use_safetensors=False` was given.
        """
        with load_safely(pretrained_model_name_or_path, kwargs) as kwargs:
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Share the components of a loaded pipeline as `DiffusionPipeline.from_pipe` does, but keep their dtype."""
        return super().from_pipe(pipeline, **{"dtype": pipeline.dtype} | kwargs)  # type: ignore[misc]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load the config as `ConfigMixin.load_config` does, and refuse a folder with a damaged one or of absurd sizes.

        Raises
        ------
        OSError
            `model_index.json` or the config of the scheduler is damaged; names the file.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / "model_index.json").is_file():
            read_json(folder / "model_index.json")
        if (folder / "scheduler" / "scheduler_config.json").is_file():
            check_scheduler_config(folder / "scheduler" / "scheduler_config.json")
        return super().load_config(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the pipeline as `DiffusionPipeline.save_pretrained` does, as safetensors only, whole or not at all.

        Parameters
        ----------
        save_directory
            Folder to write; a pipeline in it is replaced, other files stay.
        push_to_hub
            Also upload the folder, with a card if it has none; see [`SCRDiTPipeline.push_to_hub`].
        **kwargs
            Those of `DiffusionPipeline.save_pretrained` (`variant`, `max_shard_size`, ...) and, for the upload,
            `repo_id` (default: the folder's name), `commit_message`, `private`, `token`, `create_pr`.

        Raises
        ------
        ValueError
            `safe_serialization=False` was given, or a LoRA adapter is loaded, which would be lost.
        OSError
            The folder cannot be written, and stays as it was; or the upload failed, and it is written.
        """
        folder = saving_folder(save_directory, kwargs)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        options = {name: kwargs.pop(name) for name in names if name in kwargs} if push_to_hub else {}
        with write_into(folder, weights_last(folder, kwargs.get("variant"))) as temporary:
            super().save_pretrained(str(temporary), **kwargs)
        if push_to_hub:
            repo_id = options.pop("repo_id", Path(folder).name)
            with explain_push(repo_id, f"The pipeline is saved in {folder}."):
                self._upload(folder, repo_id, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload the pipeline as `DiffusionPipeline.push_to_hub` does, with a model card.

        The card and its figures are those of the folder from which the pipeline was loaded. If there is none, the
        repository keeps its card or, lacking one, gets a card of what the pipeline itself knows.

        Parameters
        ----------
        repo_id
            Repository, such as "user/scrdit-pbmc"; created if it does not exist.
        commit_message
            `None`: "Upload SCRDiTPipeline".
        private
            Make a new repository private; `None` takes the account's default.
        token
            Token for the Hub; the stored one if `None`.
        create_pr
            Open a pull request instead of committing to the main branch.
        safe_serialization
            Must be `True`.
        variant
            Part of the names of the weight files, such as "fp16".
        subfolder
            Folder of the repository to write to; no card is written if given.

        Returns
        -------
        URL of the commit.

        Raises
        ------
        OSError
            The Hub refused or cannot be reached; the message says what to do.
        """
        with tempfile.TemporaryDirectory() as folder, explain_push(repo_id):
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._upload(folder, repo_id, commit_message, private, token, create_pr, subfolder)

    def _upload(
        self,
        folder: str,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> str:
        """Upload a folder to which the pipeline was saved, with a card."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not subfolder and not (Path(folder) / "README.md").is_file():
            try:  # not at the top: cards need matplotlib and Jinja, and the code on the Hub does not
                cards = importlib.import_module("scrdit_diffusers.evaluation.model_card")
            except ImportError as error:
                logger.warning("No model card is written (%s): pip install 'scrdit-diffusers[train]'.", error)
            else:
                has_card = api.file_exists(repo_id, "README.md")
                cards.write_card_of(self, folder, repo_id, from_scratch=not has_card)
        return upload_pipeline(folder, repo_id, token, commit_message or "Upload SCRDiTPipeline", create_pr, subfolder)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any):
        """Read LoRA weights, from safetensors only."""
        with load_safely(pretrained_model_name_or_path_or_dict, kwargs) as kwargs:
            return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], *args, **kwargs):
        """Load an adapter as diffusers' LoRA pipelines do.

        Raises
        ------
        ValueError
            The processor beside the adapter has other genes or labels than the pipeline's, or the adapter is damaged or
            for another model.
        """
        source = pretrained_model_name_or_path_or_dict
        self._check_adapter(source, kwargs)
        try:
            super().load_lora_weights(source, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{'' if isinstance(source, dict) else f'{source}: '}{error}") from error

    def _check_adapter(self, source: str | dict[str, torch.Tensor], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError for an adapter of other genes or labels, even if there are as many."""
        if isinstance(source, dict) or Path(source).is_file():
            return
        names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        try:
            adapter = type(self.processor).from_pretrained(
                source, subfolder="processor", **{name: kwargs[name] for name in names if name in kwargs}
            )
        except OSError:  # an adapter that another program wrote
            return
        own = self.processor
        if (adapter.var_names, adapter.conditions) != (own.var_names, own.conditions):
            raise ValueError(
                f"The adapter in {source} was trained on other genes or labels than those of this pipeline. If it came "
                f"with the pipeline that it belongs to: SCRDiTPipeline.from_pretrained({str(source)!r}), then load it."
            )

    @classmethod
    def save_lora_weights(cls, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save LoRA weights as diffusers' LoRA pipelines do, as safetensors only."""
        super().save_lora_weights(saving_folder(save_directory, kwargs), *args, **kwargs)
        make_readable(save_directory)
