"""The variables by which a launcher gives a process its place: whole, and of a launcher that this program knows."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_tropd.errors import ConfigError

_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# what launchers that start several processes say of their number
_STARTERS = {
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh",
    "JSM_NAMESPACE_SIZE": "jsrun",
}


def check_variables(environment: Mapping[str, str]) -> None:
    """Make sure that torchrun's variables are all there or none, and numbers where they must be.

    Raises:
        ConfigError: names the variable, its value and what to do.
    """
    numbers = {name: _number(name, environment[name]) for name in _NUMBERS if name in environment}
    if "RANK" not in environment:
        if numbers.get("WORLD_SIZE", 1) != 1:
            raise ConfigError(f"WORLD_SIZE={numbers['WORLD_SIZE']} is set, but RANK is not. {_FIX}")
        return
    missing = [name for name in _PLACE if not environment.get(name)]
    if missing:
        raise ConfigError(f"RANK={environment['RANK']} is set, but not {' and '.join(missing)}. {_FIX}")
    rank, world, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if world < 1 or not 0 <= rank < world:
        raise ConfigError(f"RANK={rank} is none of the {world} ranks of WORLD_SIZE={world}. {_FIX}")
    if not 0 <= port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} is no port: give a number from 1 to 65535.")


_FIX = "Start ranks with torchrun, which sets them all, or set none of them for a single process."


def check_launcher(environment: Mapping[str, str]) -> None:
    """Make sure that this process is not one of several that would each take itself for the only one.

    Raises:
        ConfigError: something started several tasks, and no variable says which of them this is.
    """
    if "RANK" in environment:
        return
    for name, starter in _STARTERS.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name}={count}, but RANK is not set: {starter} has started {count} processes that know nothing of "
                "each other and would all write to the same run. Start one torchrun on every node, as "
                "examples/slurm/train.sbatch does; for a single process within such a job, unset the variable "
                f"(`env -u {name} ...`)."
            )


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a number. {_FIX}") from None
