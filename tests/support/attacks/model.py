"""Model directories that are made to hang, to fill the memory or to run code: each is refused by name, in seconds."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.attacks import Attack, Hole

# chat templates that never end, or fill the memory
TEMPLATES = {
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text ten billion characters long": "{{ 'x' * 10000000000 }}",
    "a number of ten billion digits": "{{ 10 ** 10000000000 }}",
    "a text that doubles with every message": (
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}
_HERE = Path(__file__).resolve().parents[3]
_SECONDS = 60  # an attack that has not ended by then has got through
_MOST_MIB = 400
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def save_good(directory: Path) -> Path:
    """Write a model directory without weights, of which every file is as it should be."""
    from tests.support.chat_families import save_byte_tokenizer

    save_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(_CONFIG))
    return directory


def _open(directory: Path) -> None:
    """Open a model directory as every command does, and put a text through its tokenizer."""
    from megatron_tropd.convert.companions import companions_of
    from megatron_tropd.convert.hf import read_architecture
    from megatron_tropd.data.tokenizer import load_tokenizer

    read_architecture(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.decode(tokenizer.render_prompt("a few words"))
    companions_of(directory)


def _refused(change: Callable[[Path], object]) -> Callable[[Path], str]:
    """What is said of a directory with one file changed: an error that names it, in seconds and little memory."""

    def attempt(directory: Path) -> str:
        from megatron_tropd.errors import CheckpointError, TokenizerError

        model = save_good(directory / "model")
        _open(model)  # and imports what that takes
        change(model)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            with _alarm():
                _open(model)
        except (CheckpointError, TokenizerError) as error:
            said = str(error)
        else:
            raise Hole("taken as a model")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > _MOST_MIB:
            raise Hole(f"{grown} MiB for it")
        if str(model) not in said and "config.json" not in said:
            raise Hole(f"nothing is named: {said[:100]}")
        return f"{said.replace(str(model), 'MODEL')[:150]} ({time.monotonic() - began:.1f} s)"

    return attempt


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise Hole within the block when it has taken too long: also out of a call that waits."""

    def give_up(*_: object) -> None:
        raise Hole(f"still at it after {_SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def _config(**changes: object) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(json.dumps(_CONFIG | changes))


def _pipe(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


def _device(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("/dev/zero")

    return change


def _huge(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        with (model / name).open("ab") as file:
            file.truncate(40 << 30)  # of which the disk holds nothing

    return change


def _deep(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text("[" * 100_000 + "]" * 100_000)


def _tokenizer(**changes: object) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        tree = json.loads((model / "tokenizer.json").read_text())
        (model / "tokenizer.json").write_text(json.dumps(tree | changes))

    return change


def _rules(kind: str, *rules: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", kind: list(rules)}


def _doubling(count: int) -> tuple[dict[str, object], ...]:
    return ({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"},) * count


_GROWS = {"type": "Replace", "pattern": {"Regex": ""}, "content": "word " * 10}


def _template(text: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))

    return change


def _harmful_pickle(directory: Path) -> str:
    """Load a pickle that makes a directory, with the variable set that lets torch build what it names."""
    import pickle

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(directory / "harm"),)

    (directory / "common.pt").write_bytes(pickle.dumps({"step": Harm()}, protocol=2))
    code = f"import megatron_tropd, torch; torch.load({str(directory / 'common.pt')!r}, weights_only=True)"
    environment = {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONPATH": str(_HERE),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if (directory / "harm").exists():
        raise Hole("its code ran")
    if done.returncode == 0:
        raise Hole("it was loaded")
    return "the variable is unset; " + done.stderr.strip().splitlines()[-1][:100]


# by command: its arguments, for a configuration, its student and a place to write
_COMMANDS: dict[str, Callable[[str, str, str], list[str]]] = {
    "check": lambda config, model, out: ["check", config],
    "train": lambda config, model, out: ["train", config],
    "generate": lambda config, model, out: ["generate", config, f"{out}.jsonl"],
    "evaluate": lambda config, model, out: ["evaluate", config],
    "score": lambda config, model, out: ["score", config, f"teacher.record={out}"],
    "convert": lambda config, model, out: ["convert", "hf-to-megatron", model, out],
    "serve": lambda config, model, out: ["serve", "student", config],
}


def _refused_by(command: str, change: Callable[[Path], object]) -> Callable[[Path], str]:
    """What a command says of a student with one file changed."""

    def attempt(directory: Path) -> str:
        from tests.support.run_inputs import make_task

        task = make_task(directory / "task")
        change(task.student)
        arguments = _COMMANDS[command](str(task.config), str(task.student), str(directory / "out"))
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "megatron_tropd", *arguments],
            env={**os.environ, "PYTHONPATH": str(_HERE), "OMP_NUM_THREADS": "1"},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        said = done.stderr.strip()
        if done.returncode != 2 or "Traceback" in said or str(task.student) not in said:
            raise Hole(f"status {done.returncode}: {said[-200:]}")
        return f"{said.replace(str(task.student), 'MODEL')[-200:]} ({time.monotonic() - began:.1f} s with its start)"

    return attempt


_CHANGES: dict[str, Callable[[Path], object]] = {
    "2 * 10^7 layers": _config(num_hidden_layers=2 * 10**7),
    "10^15 layers of a text model within": _config(text_config={"num_hidden_layers": 10**15}),
    "a layer 10^9 wide": _config(hidden_size=10**9),
    "10^9 experts": _config(
        architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=10**9, num_experts_per_tok=2
    ),
    "an infinite vocabulary": lambda model: (model / "config.json").write_text(
        json.dumps(_CONFIG).replace('"vocab_size": 300', '"vocab_size": 1e999')
    ),
    "no heads": _config(num_attention_heads=0),
    "config.json, lists 10^5 deep": _deep("config.json"),
    "config.json, a list of lists in a setting": lambda model: (model / "config.json").write_text(
        json.dumps(_CONFIG)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "config.json, a named pipe": _pipe("config.json"),
    "config.json, a link to /dev/zero": _device("config.json"),
    "config.json of 40 GiB": _huge("config.json"),
    "tokenizer.json, lists 10^5 deep": _deep("tokenizer.json"),
    "tokenizer.json, a named pipe": _pipe("tokenizer.json"),
    "tokenizer.json of 40 GiB": _huge("tokenizer.json"),
    "tokenizer_config.json, a named pipe": _pipe("tokenizer_config.json"),
    "tokenizer_config.json, lists 10^5 deep": _deep("tokenizer_config.json"),
    "special_tokens_map.json, a link to /dev/zero": _device("special_tokens_map.json"),
    "generation_config.json, a named pipe": _pipe("generation_config.json"),
    "generation_config.json, lists 10^5 deep": _deep("generation_config.json"),
    "chat_template.jinja of 40 GiB": _huge("chat_template.jinja"),
    "model.safetensors, a named pipe": _pipe("model.safetensors"),
    "a normalizer that doubles a letter forty times": _tokenizer(normalizer=_rules("normalizers", *_doubling(40))),
    "one that writes a page between all letters, four times": _tokenizer(
        normalizer=_rules("normalizers", *([_GROWS] * 4))
    ),
    "the same in a decoder": _tokenizer(decoder=_rules("decoders", *_doubling(40))),
    "the same within sequences of sequences": _tokenizer(
        normalizer=_rules("normalizers", *([_rules("normalizers", *_doubling(10))] * 4))
    ),
    **{f"a chat template: {name}": _template(text) for name, text in TEMPLATES.items()},
}
ATTACKS = (
    *(
        # those of templates take their ten seconds, and ``unit/data/test_template_limits.py`` is less patient
        Attack(name=name, attempt=_refused(change), quick=not name.startswith("a chat template"))
        for name, change in _CHANGES.items()
    ),
    *(
        Attack(name=f"`tropd {command}`: {name}", attempt=_refused_by(command, _CHANGES[name]), quick=False)
        for command in _COMMANDS
        for name in ("config.json, a named pipe", "a chat template: loops within loops")
        if command not in ("convert", "serve") or "template" not in name  # these read no template
    ),
    Attack(name="a pickle in common.pt, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1", attempt=_harmful_pickle, quick=False),
)
