"""Models by their names on the hub, fetched to its cache: safetensors, config and tokenizer, never code or pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megatron_tropd.convert.hf import INDEX, SINGLE
from megatron_tropd.data.hub import HubName, explained, host_lock
from megatron_tropd.errors import ConfigError
from megatron_tropd.progress.phases import Phase

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

    class _Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                self.n += n or 0
                phase.reach(int(self.n), share=self.n / self.total if self.total else None)

    return _Bar
