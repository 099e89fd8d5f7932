"""Models by their names on the hub, fetched to its cache: safetensors, config and tokenizer, never code or pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megatron_tropd.convert.hf import INDEX, SINGLE
from megatron_tropd.data.hub import HubName, explained, host_lock, innermost, one_line, unreachable
from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.storage.owned import MARKER

Parts = Literal["config", "tokenizer", "all"]  # what of a model is needed; each has the parts before it
_CONFIG = ("config.json",)
_TOKENIZER = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "*.tiktoken"),
)
_WEIGHTS = (SINGLE, INDEX, "model-*-of-*.safetensors")
_FILES: dict[Parts, tuple[str, ...]] = {
    "config": _CONFIG,
    "tokenizer": (*_CONFIG, *_TOKENIZER),
    "all": (*_CONFIG, *_TOKENIZER, *_WEIGHTS),
}


def fetch_model(name: HubName, *, parts: Parts, key: str) -> Path:
    """Return the directory of a model at a commit in the hub's cache, fetched where it is not there.

    What was cut off is resumed, what is cached is not requested again, and one process of a host fetches.

    Args:
        name: with a commit as its revision (``data.hub.commit_of``).
        key: where the name was written, for messages.

    Raises:
        ConfigError: the hub refuses, cannot be reached, or has no safetensors of the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    assert name.commit is not None
    with (
        host_lock(f"model-{name.repo.replace('/', '--')}-{name.commit}", f"fetching {name}"),
        Phase(f"fetching {name} from the hub") as phase,
    ):
        try:
            found = Path(
                snapshot_download(
                    name.repo,
                    revision=name.commit,
                    allow_patterns=list(_FILES[parts]),
                    # fnmatch's * crosses folders: copies in other formats lie in some
                    ignore_patterns=["*/*.json", "*/*.safetensors", "*/*.tiktoken"],
                    tqdm_class=_bar_of(phase),
                )
            )
        except (HfHubHTTPError, OSError) as error:
            raise explained(error, name, key) from None
    _check_whole(found, name, parts, key)
    return found


def check_push(name: str) -> None:
    """Raise ConfigError when a model cannot be pushed later, as far as this machine knows."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise ConfigError(f"export.push_to_hub = '{name}': HF_HUB_OFFLINE is set. Unset it, or do not push.")
    if not get_token():
        raise ConfigError(
            f"export.push_to_hub = '{name}': no token is set. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write there."
        )


def push_model(directory: Path, name: str, *, private: bool, message: str) -> str:
    """Push a model directory to the hub as one commit; return its address. What is on disk stays.

    Args:
        private: whether a repository that has to be made is private.

    Raises:
        StorageError: the hub refuses, or cannot be reached; it says how to push by hand.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with Phase(f"pushing {directory} to {name}"):
        try:
            api = HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            pushed = api.upload_folder(
                repo_id=name, folder_path=directory, commit_message=message, ignore_patterns=[MARKER]
            )
        except (HfHubHTTPError, OSError, RuntimeError, ValueError, *unreachable()) as error:
            raise StorageError(
                f"export.push_to_hub = '{name}': {one_line(innermost(error))}. The export is whole, in "
                f"{directory.absolute()}: push it by hand with `hf upload {name} {directory}`."
            ) from None
    return str(pushed.commit_url)


def _check_whole(found: Path, name: HubName, parts: Parts, key: str) -> None:
    if not (found / "config.json").is_file():
        raise ConfigError(
            f"{key} = '{name.written}': the repository has no config.json, so it is no model. Name another."
        )
    if parts == "all" and not any((found / file).is_file() for file in (SINGLE, INDEX)):
        raise ConfigError(
            f"{key} = '{name.written}': the repository has no {SINGLE} or {INDEX}. Pickles are not read: convert it "
            "with transformers (save_pretrained), and give that directory."
        )


def _bar_of(phase: Phase) -> Any:
    """Return a progress bar class of the hub's kind that draws nothing, and counts bytes for a phase."""
    from huggingface_hub.utils import tqdm

    class _Bar(tqdm):  # type: ignore[misc]  # Any to mypy
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                self.n += n or 0
                phase.reach(int(self.n), share=self.n / self.total if self.total else None)

    return _Bar
