"""The objectives of the parity table: every factory of ``losses.terms`` with the textbook formula that proves it.

A term knows its proof: what ``losses.terms`` offers and PROOFS lacks, option by option, is an error here, and so in all
tests that compare gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from types import ModuleType
from typing import Any, get_args, get_type_hints

from megatron_tropd.losses import terms
from megatron_tropd.losses.support import ReverseTail
from megatron_tropd.losses.terms import Term
from megatron_tropd.types import SupportKind
from tests.support import parity_truth as truth

SUPPORTS: tuple[SupportKind, ...] = get_args(SupportKind)
_SHARED = {"k", "tail", "support"}  # options that every case and every support runs through anyway
# builders of other terms, with those that prove them
PROVEN_BY = {"policy_gradient": ("k1_pg", "extrapolated_pg", "prefix_pg_scalar")}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One objective: the package's term for a support of k, and its formula."""

    term: str
    support: SupportKind | None = None  # None: it uses none
    tail: ReverseTail | None = None
    build: Callable[[int], Term]
    textbook: truth.Textbook

    @property
    def row(self) -> str:
        """Its row of the table."""
        return f"{self.term} | {self.support or '-'} | {self.tail or '-'}"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The formula of a factory with some of its options."""

    textbook: Any  # of a term over a support: from the tail to the formula
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # of the row; "" is the factory's own
    build: Callable[[int], Term] | None = None  # of a combinator, for a support of k


PROOFS: dict[str, tuple[Proof, ...]] = {
    "k1_pg": (
        Proof(textbook=truth.k1_pg),
        Proof(textbook=truth.k1_pg_clip, options={"clip": truth.CLIP}, name="k1_pg, PPO clip"),
        Proof(textbook=truth.k1_pg_floor, options={"floor": truth.FLOOR}, name="k1_pg, reward floor"),
        Proof(textbook=truth.k1_pg_sign, options={"shape": "sign"}, name="k1_pg, sign of the reward"),
        Proof(textbook=truth.k1_pg_log, options={"shape": "log"}, name="k1_pg, log of the reward"),
    ),
    "extrapolated_pg": (
        Proof(textbook=truth.extrapolated, options={"lam": truth.LAM}),
        Proof(
            textbook=truth.extrapolated_clip,
            options={"lam": truth.LAM, "clip": truth.CLIP},
            name="extrapolated_pg, PPO clip",
        ),
    ),
    "k2": (Proof(textbook=truth.k2),),
    "k3": (
        Proof(textbook=truth.k3_bounded, options={"bound": truth.BOUND}),
        Proof(textbook=truth.k3, options={"bound": None}, name="k3, unbounded"),
    ),
    "reward_pg": (
        Proof(textbook=truth.reward_pg),
        Proof(textbook=truth.reward_pg_clip, options={"clip": truth.CLIP}, name="reward_pg, PPO clip"),
    ),
    "reference_k3": (Proof(textbook=truth.reference_k3),),
    "reference_pg": (
        Proof(textbook=truth.reference_pg),
        Proof(textbook=truth.reference_pg_clip, options={"clip": truth.CLIP}, name="reference_pg, PPO clip"),
    ),
    "nll": (Proof(textbook=truth.nll),),
    "prefix_pg_scalar": (Proof(textbook=truth.prefix_pg_scalar),),
    "fkl_topk": (Proof(textbook=truth.fkl_topk),),
    "rkl_topk": (Proof(textbook=truth.rkl_topk),),
    "jsd_topk": (Proof(textbook=truth.jsd_topk(0.3), options={"beta": 0.3}, name="jsd_topk, beta 0.3"),),
    "fkl_pg_scalar": (Proof(textbook=truth.fkl_pg_scalar),),
    "fkl_full": (Proof(textbook=truth.fkl_full),),
    "rkl_full": (Proof(textbook=truth.rkl_full),),
    "jsd_full": (
        Proof(textbook=truth.jsd_full(0.5), options={"beta": 0.5}, name="jsd_full, beta 0.5"),
        Proof(textbook=truth.jsd_full(0.1), options={"beta": 0.1}, name="jsd_full, beta 0.1"),
    ),
    "NONE": (Proof(textbook=truth.none, name="none", build=lambda k: terms.NONE),),
    "scaled": (
        Proof(
            textbook=lambda rows: 0.25 * truth.nll(rows),
            options={"factor": 0.25},
            name="nll, scaled",
            build=lambda k: terms.scaled(terms.nll(), 0.25),
        ),
    ),
    "where_teacher_uncertain": (
        Proof(
            textbook=truth.uncertain_fkl("none"),
            options={"entropy": truth.UNCERTAIN},
            name="fkl_topk where the teacher is uncertain | teacher | none",
            build=lambda k: terms.where_teacher_uncertain(terms.fkl_topk(k=k), entropy=truth.UNCERTAIN),
        ),
    ),
}


def offered(module: ModuleType = terms) -> dict[str, set[str]]:
    """What makes a term there, with the options that a proof must cover."""
    found: dict[str, set[str]] = {}
    for name, thing in vars(module).items():
        if isinstance(thing, Term):
            found[name] = set()
        elif inspect.isfunction(thing) and not name.startswith("_") and thing.__annotations__.get("return") == "Term":
            found[name] = set(inspect.signature(thing).parameters) - _SHARED - {"term"}
    return found


def cells(module: ModuleType = terms) -> Iterator[Cell]:
    """Yield what the module offers, in the order of its source, over every support and tail where it has them.

    Raises:
        LookupError: something offered has no formula, or an option is in none of its proofs.
    """
    for name, options in offered(module).items():
        if name in PROVEN_BY:
            assert PROOFS.keys() >= set(PROVEN_BY[name])
            continue
        if name not in PROOFS:
            raise LookupError(f"{module.__name__}.{name} has no textbook formula: write one, and its row in PROOFS.")
        covered = {option for proof in PROOFS[name] for option in proof.options}
        if options - covered:
            raise LookupError(f"no proof of {module.__name__}.{name} sets {', '.join(sorted(options - covered))}.")
        for proof in PROOFS[name]:
            yield from _cells_of(getattr(module, name), proof, name)


def _cells_of(factory: Any, proof: Proof, name: str) -> Iterator[Cell]:
    words, options = (proof.name or name).split(" | "), dict(proof.options)
    if proof.build is not None or "support" not in inspect.signature(factory).parameters:
        build = proof.build or (lambda k: factory(**options))
        support, tail = words[1:] or (None, None)
        yield Cell(term=words[0], support=support, tail=tail, build=build, textbook=proof.textbook)  # type: ignore[arg-type]
        return
    for support, tail in product(SUPPORTS, get_args(get_type_hints(factory)["tail"])):
        build = lambda k, s=support, t=tail: factory(k=k, tail=t, support=s, **options)  # noqa: E731
        yield Cell(term=words[0], support=support, tail=tail, build=build, textbook=proof.textbook(tail))


CELLS = tuple(cells())
