"""The filter, run here as the kernel would: which calls it lets through, by number and first argument."""

from __future__ import annotations

import errno
import struct

import pytest

from megatron_tropd.evaluate.syscall_filter import filter_for

ALLOWED, KILLED = "allowed", "killed"
X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003
CLONE_NEWUSER, SIGCHLD, PTHREAD = 0x10000000, 17, 0x3D0F00  # what glibc gives to clone for a thread


def verdict(program: bytes, number: int, argument: int = 0, *, architecture: int = X86_64) -> str | int:
    """What becomes of a call: allowed, killed, or the number of an error. By the kernel's documentation of BPF."""
    data = struct.pack("=IIQQ", number & 0xFFFFFFFF, architecture, 0, argument)
    instructions = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    accumulator, place = 0, 0
    while True:
        code, yes, no, k = instructions[place]
        place += 1
        if code == 0x06:
            action = k & 0xFFFF0000
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(action, k & 0xFFFF)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            place += yes if taken else no


@pytest.mark.parametrize("network", [True, False])
def test_calls_are_refused_by_their_numbers_on_x86(network):
    program = filter_for("x86_64", network=network)
    assert program is not None
    # read, write, mmap, exit_group, futex, execve, wait4
    assert {verdict(program, number) for number in (0, 1, 9, 231, 202, 59, 61)} == {ALLOWED}
    # ptrace, process_vm_writev, unshare, setns, mount, memfd_create, shmget, bpf, io_uring_setup, keyctl
    assert {verdict(program, n) for n in (101, 311, 272, 308, 165, 319, 29, 321, 425, 250)} == {errno.EPERM}
    assert verdict(program, 435) == errno.ENOSYS  # clone3: glibc then takes clone
    assert (verdict(program, 56, PTHREAD), verdict(program, 56, SIGCHLD)) == (ALLOWED, ALLOWED)
    assert verdict(program, 56, CLONE_NEWUSER | SIGCHLD) == errno.EPERM
    families = {family: verdict(program, 41, family) for family in (1, 2, 10, 16, 17, 38, 40)}
    allowed = {family for family, end in families.items() if end == ALLOWED}
    assert allowed == ({1, 2, 10} if network else set())
    assert set(families.values()) <= {ALLOWED, errno.EAFNOSUPPORT}
    assert (verdict(program, 53, 1), verdict(program, 53, 30)) == (ALLOWED, errno.EAFNOSUPPORT)


def test_other_sets_of_numbers_do_not_get_around_it():
    program = filter_for("x86_64", network=True)
    assert program is not None
    assert verdict(program, 101, architecture=I386) == KILLED
    assert verdict(program, 0x40000000 | 521) == errno.ENOSYS  # ptrace of x32


def test_the_numbers_of_arm_are_its_own():
    program = filter_for("aarch64", network=False)
    assert program is not None

    def end(number: int, argument: int = 0) -> str | int:
        return verdict(program, number, argument, architecture=AARCH64)

    assert {end(number) for number in (63, 64, 222, 94, 98, 221, 260)} == {ALLOWED}
    assert {end(number) for number in (117, 97, 268, 40, 279, 194, 280, 425)} == {errno.EPERM}
    assert (end(220, CLONE_NEWUSER), end(220, SIGCHLD), end(198, 2)) == (errno.EPERM, ALLOWED, errno.EAFNOSUPPORT)
    assert verdict(program, 63) == KILLED  # a call of another machine's
    assert filter_for("riscv64", network=True) is None
