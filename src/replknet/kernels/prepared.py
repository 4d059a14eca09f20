"""What backends prepare from weights, kept with the weights: it dies when they do.

A backend may need weights in another form, as spectra or as taps in another order. Where that form takes time to make,
the backend leaves it here after a call and finds it in the next one. The owner is the weight tensor itself, which is
held weakly. Copies that a call makes of a weight (in autocast's dtype, or dense) share what belongs to the weight.

Nothing here says whether a weight has changed since: fused optimisers, `.data` and numpy change no version counter. A
backend has to prove it, as the C++ core does with a checksum of the bytes.
"""

import itertools
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# of everything that is kept; what was used longest ago goes first
LIMIT_BYTES = 512 << 20


class Form(Protocol):
    """A weight in the form that a backend needs."""

    nbytes: int
    used: int  # the `next_use()` of its last use


Forms = dict[Hashable, Form]


@dataclass(frozen=True, slots=True)
class _Owner:
    weight: "weakref.ref[Tensor]"
    forms: Forms  # shared by a weight and its copies


# by id, since tensors compare element by element; an entry leaves with its tensor
_owners: dict[int, _Owner] = {}
# numbers that grow from use to use
next_use = itertools.count().__next__


def forms_of(weight: Tensor) -> Forms:
    """What is kept for a weight, by keys of the backends' choice.

    A backend takes out what it uses, so that no two calls use it at once, and puts it back with a new `next_use()`.
    """
    owner = _owners.get(id(weight))
    if owner is not None and owner.weight() is weight:
        return owner.forms
    forms: Forms = {}
    _own(weight, forms)
    return forms


def _own(weight: Tensor, forms: Forms) -> None:
    key = id(weight)

    def forget(gone: "weakref.ref[Tensor]") -> None:
        # another tensor may live at this address by now
        owner = _owners.get(key)
        if owner is not None and owner.weight is gone:
            del _owners[key]

    _owners[key] = _Owner(weakref.ref(weight, forget), forms)


def share(copy: Tensor, weight: Tensor) -> None:
    """Let a copy of a weight, in any dtype or layout, use and keep what is kept for the weight."""
    _own(copy, forms_of(weight))


def held_bytes() -> int:
    """Memory of all that is kept."""
    return sum(form.nbytes for forms in _all() for form in forms.copy().values())


def make_room(nbytes: int, limit: int | None = None) -> None:
    """Give up what was used longest ago until so many bytes more fit below the limit; a new form calls this first."""
    limit = LIMIT_BYTES if limit is None else limit
    kept = sorted(
        ((form.used, form.nbytes, forms, key) for forms in _all() for key, form in forms.copy().items()),
        key=lambda entry: entry[0],
    )
    excess = sum(size for _, size, _, _ in kept) + nbytes - limit
    for _, size, forms, key in kept:
        if excess <= 0:
            return
        forms.pop(key, None)
        excess -= size


def _all() -> list[Forms]:
    # copy() is one step for other threads; a weight and its copies have one and the same dictionary
    return list({id(owner.forms): owner.forms for owner in _owners.copy().values()}.values())
