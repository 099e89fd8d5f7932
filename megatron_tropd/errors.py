"""The exceptions a user can meet. A message says what is wrong, the value seen, and what to do about it."""

import unicodedata

EXIT_ERROR = 2

# docs/commands.md holds them as a table
EXIT_STATUSES = {
    "0": "done",
    "1": "a defect of the program, or of what it runs on: a traceback says where",
    "2": "an error that a message explains, with the value and the fix; a command line that cannot be read; "
    "machines that are not fit (`tropd health`); a disk that is full",
    "75": "a training run that was asked to stop (SIGTERM, SIGUSR1, SIGHUP) and has left a checkpoint where there was "
    "something to save: the same command again resumes",
    "130": "the same after Ctrl-C, on which nobody puts a run back into the queue",
    "128 + n": "a command that signal number n has stopped: 143 on SIGTERM; also a rank that the signal has ended",
}


def exit_statuses_table() -> str:
    """Return what the exit statuses mean as a Markdown table."""
    return (
        "\n".join(["| status | meaning |", "|---|---|", *(f"| {k} | {v} |" for k, v in EXIT_STATUSES.items())]) + "\n"
    )


def printable(text: str) -> str:
    """Write control characters, formatting ones and halves of characters as escapes, all but line breaks and tabs.

    Names of files, words of models and answers of servers are then fit for a terminal, a log and a page.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or _is_space(c) else _escaped(c) for c in text)


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class TropdError(Exception):
    """Root of all errors raised on purpose by this package. What it says is printable, whatever it quotes."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class ConfigError(TropdError, ValueError):
    """A configuration (file, override, method option, layout) cannot be used."""


class DataError(TropdError, ValueError):
    """A prompt file, recorded rollout or recorded score on disk cannot be used."""


class TokenizerError(TropdError, ValueError):
    """A tokenizer is missing, unusable, or not the one the other model uses."""


class CheckpointError(TropdError, RuntimeError):
    """A checkpoint (Hugging Face or our own) is missing, torn, or of another model."""


class ModelFileError(CheckpointError):
    """A file of a model directory is no file, or takes more time or memory than that of any model does."""


class SelfCheckError(TropdError, RuntimeError):
    """A launch-time self check found that something which must be equal is not."""


class EngineError(TropdError, RuntimeError):
    """Training cannot continue: a loss or gradient is not finite, a rank disagrees."""


class ServingError(TropdError, RuntimeError):
    """An inference engine or server cannot be used: unreachable, failing, answering nonsense, or with other weights."""


class SandboxError(TropdError, RuntimeError):
    """A program of a model could not be run at all, so that nothing is known of it."""


class HealthError(TropdError, RuntimeError):
    """The machines are not fit to train on."""


class StorageError(TropdError, OSError):
    """A file or directory cannot be written: a full disk, no permission, or somebody's files in the way."""
