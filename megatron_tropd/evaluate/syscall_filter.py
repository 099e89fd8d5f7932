"""The seccomp filter of programs that nobody has read: which calls of the kernel they may not make.

Calls that make namespaces, reach into other processes, hide memory where no limit counts it, load code into the kernel,
or open sockets of another kind than the network's and the machine's own are refused with an error, as a kernel without
them would: a right program that tries one still runs. The numbers are Linux's (``asm/unistd.h``), the layout of a
filter ``linux/filter.h``'s and ``linux/seccomp.h``'s.
"""

from __future__ import annotations

import errno
import struct

# by machine: AUDIT_ARCH, and the number of every call by its name
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "process_mrelease": (448, 448),
    # namespaces and file systems
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # memory that belongs to no process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # wide doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18), "move_pages": (279, 239), "migrate_pages": (256, 238), "syslog": (103, 116),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "iopl": (172, -1),
    "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
# linux/sched.h: CLONE_NEW NS, CGROUP, UTS, IPC, USER, PID, NET; NEWTIME is no flag of clone
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_UNIX, _NETWORK = 1, (2, 10)  # address families: this machine's own, IPv4 and IPv6
_X32 = 0x40000000  # the bit of x86's second set of numbers

# linux/bpf_common.h: load a word, jump if equal, at least, or any bit is set, return
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in struct seccomp_data
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000

Instruction = tuple[int, int, int, int]


def filter_for(machine: str, *, network: bool) -> bytes | None:
    """Return the filter for ``os.uname().machine`` as an array of ``struct sock_filter``; None for one not known here.

    Args:
        network: whether sockets may be made, which is harmless in a network namespace of its own.
    """
    if machine not in _ARCHITECTURES:
        return None
    column = list(_ARCHITECTURES).index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), _error(errno.ENOSYS)]
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            program += [(_EQUAL, 0, 1, numbers[column]), _error(errno.EPERM)]
    # its flags are in memory, where a filter does not look: the C library then uses clone
    program += [(_EQUAL, 0, 1, _CLONE3[column]), _error(errno.ENOSYS)]
    program += _if_number(_CLONE[column], [(_ANY_BIT, 0, 1, _NEW_NAMESPACES), _error(errno.EPERM)])
    families = (_UNIX, *_NETWORK) if network else ()
    program += _if_number(_SOCKET[column], _only(families))
    program += _if_number(_SOCKETPAIR[column], _only((_UNIX,)))
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _error(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | number)


def _if_number(number: int, body: list[Instruction]) -> list[Instruction]:
    """Look at the first argument of a call with this number, and allow it where ``body`` falls through."""
    inside = [(_LOAD, 0, 0, _FIRST_ARGUMENT), *body, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(inside), number), *inside]


def _only(families: tuple[int, ...]) -> list[Instruction]:
    """Refuse a socket of another family than these."""
    checks: list[Instruction] = [(_EQUAL, len(families) - place, 0, family) for place, family in enumerate(families)]
    return [*checks, _error(errno.EAFNOSUPPORT)]
