"""The Hub: weights as safetensors only, access checked before work is spent, errors that say what to do."""

import functools
import importlib
import inspect
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import OffloadedWeightsLoader
from diffusers import ModelMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # the second is of the HTTP library that it uses

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
    """Make the errors of publishing, done inside, clear.

    Parameters
    ----------
    repo_id
        Repository that is written.
    kept
        What is not lost, and how to publish it later; ends the message.

    Raises
    ------
    OSError
        The Hub refused, or cannot be reached: with the repository, the likely cause and what to do.
    """
    try:
        yield
    except (HTTPError, OSError) as error:  # the first is not always one of the second
        response = getattr(error, "response", None)
        advice = "Is there a network, and does the Hub answer? Then push again."
        if response is not None:
            advice = _ADVICE.get(response.status_code, f"The Hub answered {response.status_code}; push again later.")
        says = f"(The library says: {' '.join(str(error).split())})"
        raise OSError(" ".join(filter(None, [f"Could not push to {repo_id}.", advice, kept, says]))) from error


def prepare_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make a repository of models, unless there is one, and make sure that it may be written.

    `create_repo` alone is satisfied by a repository of somebody else.

    Parameters
    ----------
    repo_id
        Its id, or a name in the account of the token.
    private
        Make a new repository private; `None` takes the account's default.
    token
        Token for the Hub; the stored one if `None`.

    Returns
    -------
    The whole id.

    Raises
    ------
    OSError
        The repository cannot be written: [`explain_push`].
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
    """Upload a pipeline folder, without the checkpoints and logs of its training; returns the commit's address."""
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message,
        create_pr=create_pr,
        ignore_patterns=["checkpoint-*", "checkpoint-*/*", f"{logging_dir}/*"],
    )


@contextmanager
def load_safely(source: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep a loader of diffusers, run inside, from falling back to pickled files, and make its errors clear.

    Parameters
    ----------
    source
        Folder, file or repository that is loaded, or a state dict in memory.
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
        There are no safetensors, with the reason why other files do not count; the download broke off; or the
        repository cannot be reached, with its name, the revision and what to look at.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False would unpickle weights. {_SAFETENSORS_ONLY}")
    for name in (kwargs.get("weight_name"), None if isinstance(source, dict) else source):
        if name is not None and Path(str(name)).suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{name} is a pickled file. {_SAFETENSORS_ONLY}")
    try:
        yield kwargs | {"use_safetensors": True}
    except HFValidationError as error:
        raise OSError(f"{source} is neither a folder here nor the name of a repository, such as user/name.") from error
    except PermissionError:
        raise
    except OSError as error:
        if isinstance(source, (str, Path)) and any(Path(source).glob("checkpoint-*")) and "model_index" in str(error):
            raise OSError(
                f"{source} holds no pipeline yet, but checkpoints of a training run: continue with "
                "training/train.py --resume_from_checkpoint latest and its other arguments."
            ) from error
        if "safetensors" in str(error) and _SAFETENSORS_ONLY not in str(error):
            raise OSError(f"{error} {_SAFETENSORS_ONLY}") from error
        if "cached" in str(error) or str(source) not in str(error):  # whatever went wrong, and of what is not said
            revision = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise OSError(
                f"Could not load {source}{revision}. Is the name right, does the revision exist, may your token read "
                f"it (`hf auth login`, or token=...), is there a network? The library says: {error}"
            ) from error
        raise
    except HTTPError as error:  # names neither the repository nor what to do, and is no OSError
        raise OSError(f"Loading {source} broke off ({error}). Load it again: whole files are kept.") from error


def saving_folder(save_directory: str | Path, kwargs: dict[str, Any]) -> str:
    """Give the folder as the string that diffusers splits into the name of a repository.

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


class SafeModelMixin:
    """For models: reads and writes safetensors only, with errors that say what to do. Comes before `ModelMixin`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a model as `ModelMixin.from_pretrained` does, from safetensors only, and all of it.

        A `device_map` may name the "disk" for any part (with `offload_folder`), but diffusers 0.42 fails where all
        parts on the disk have no weights, such as "norm_out" alone.

        Raises
        ------
        OSError
            Weights are missing, which `ModelMixin` would leave without values.
        """
        with load_safely(pretrained_model_name_or_path, kwargs) as kwargs:
            return_info = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
            if missing := sorted(info["missing_keys"]):
                raise OSError(
                    f"{pretrained_model_name_or_path} lacks {len(missing)} weights, such as {missing[0]}: it is "
                    "damaged, or of another version of scrdit_diffusers than the one installed."
                )
            if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                # Buffers of parts on a disk stay in memory, where diffusers leaves what the constructor put into them.
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
            Weights are not in memory but offloaded; those of group offloading to a disk would be saved as garbage.
        """
        folder = saving_folder(save_directory, kwargs)
        offloaded = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]
        if offloaded or getattr(self, "_weights_on_disk", False):
            raise ValueError("The weights are offloaded: save the model before that, or load it anew and save that.")
        with explain_push(kwargs.get("repo_id") or folder) if kwargs.get("push_to_hub") else nullcontext():
            super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
        make_readable(folder)

    @functools.wraps(ModelMixin.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as `ModelMixin.enable_group_offload` does, and remember whether to a disk."""
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]
        given = inspect.signature(ModelMixin.enable_group_offload).bind(self, *args, **kwargs).arguments
        self._weights_on_disk = given.get("offload_to_disk_path") is not None

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Upload the model as `ModelMixin.push_to_hub` does; errors say what to do."""
        with explain_push(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any):
        """Load a LoRA adapter as `PeftAdapterMixin.load_lora_adapter` does, from safetensors only."""
        with load_safely(pretrained_model_name_or_path_or_dict, kwargs) as kwargs:
            return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, **kwargs)  # type: ignore[misc]

    def save_lora_adapter(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save a LoRA adapter as `PeftAdapterMixin.save_lora_adapter` does, as safetensors only."""
        super().save_lora_adapter(saving_folder(save_directory, kwargs), **kwargs)  # type: ignore[misc]
        make_readable(save_directory)


# diffusers has one LoRA mixin for each model that is a transformer alone; they differ in their names only.
class SafePipelineMixin(CogVideoXLoraLoaderMixin):
    """For pipelines: the same, LoRA adapters of the transformer, and a model card. Before `DiffusionPipeline`."""

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
            There is no such repository, revision or file, or it cannot be reached; or it holds no safetensors.
        ValueError
            `use_safetensors=False` was given.
        """
        with load_safely(pretrained_model_name_or_path, kwargs) as kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the pipeline as `DiffusionPipeline.save_pretrained` does, as safetensors only.

        Parameters
        ----------
        save_directory
            Folder to write.
        push_to_hub
            Upload the folder as well, with a card if it has none: [`SCRDiTPipeline.push_to_hub`].
        **kwargs
            Those of `DiffusionPipeline.save_pretrained` (`variant`, `max_shard_size`, ...) and for pushing `repo_id`
            (the name of the folder if not given), `commit_message`, `private`, `token`, `create_pr`.

        Raises
        ------
        ValueError
            `safe_serialization=False` was given.
        OSError
            The upload was refused or broke off; the folder is written.
        """
        folder = saving_folder(save_directory, kwargs)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        options = {name: kwargs.pop(name) for name in names if name in kwargs} if push_to_hub else {}
        super().save_pretrained(folder, **kwargs)
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
        """Upload the pipeline as `DiffusionPipeline.push_to_hub` does, with a model card that fits cells.

        The card is that of the folder from which the pipeline was loaded, with its figures. Without one, a repository
        keeps the card that it has, and one that has none gets a card that says what the pipeline itself knows.

        Parameters
        ----------
        repo_id
            Repository, such as "user/scrdit-pbmc"; made if there is none.
        commit_message
            Of the commit; "Upload SCRDiTPipeline" if `None`.
        private
            Make a new repository private; `None` takes the account's default.
        token
            Token for the Hub; the stored one if `None`.
        create_pr
            Open a pull request instead of a commit to the main branch.
        safe_serialization
            Nothing but `True` is possible.
        variant
            Such as "fp16": part of the names of the files with the weights.
        subfolder
            Folder of the repository to write to; no card is written then.

        Returns
        -------
        Address of the commit.

        Raises
        ------
        OSError
            The Hub refused, or cannot be reached, with what to do.
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
            try:  # not at the top of the file: cards need matplotlib and Jinja, and the code on the Hub has none
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
            The adapter was trained on other genes or labels than this pipeline's, by the processor beside it.
        """
        self._check_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **kwargs)

    def _check_adapter(self, source: str | dict[str, torch.Tensor], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError for an adapter of other genes or labels; their numbers alone may be equal."""
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
