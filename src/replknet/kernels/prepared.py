"""What backends prepare from weights, kept as long as the weights live.

A backend may need weights in another form, such as spectra or taps in another order. If the form takes time to make,
the backend leaves it here after a call and finds it in the next one. The owner is the weight tensor itself, which is
held weakly. A call may copy a weight (to autocast's dtype, or to be dense); the copy shares the forms of the weight.

Nothing here detects that a weight has changed: fused optimisers, `.data` and numpy change no version counter. Each
backend has to check, as the C++ core does with a checksum of the bytes.
"""

import itertools
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# of all kept forms together; the least recently used form goes first
LIMIT_BYTES = 512 << 20


class Form(Protocol):
    """A weight in the form that a backend needs."""

    nbytes: int
    used: int  # `next_use()` at its last use


Forms = dict[Hashable, Form]


@dataclass(frozen=True, slots=True)
class _Owner:
    weight: "weakref.ref[Tensor]"
    forms: Forms  # shared by a weight and its copies


# by id, since tensors compare element by element; an entry goes when its tensor dies
_owners: dict[int, _Owner] = {}
# gives a larger number at each use
next_use = itertools.count().__next__


def forms_of(weight: Tensor) -> Forms:
    """The kept forms of a weight; backends choose the keys.

    If only one call at a time may use a form, the backend takes it out and puts it back with a new `next_use()`.
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
    """Let a copy of a weight, in any dtype or layout, share the kept forms of the weight."""
    _own(copy, forms_of(weight))


def held_bytes() -> int:
    """Memory of all kept forms."""
    return sum(form.nbytes for forms in _all() for form in forms.copy().values())


def make_room(nbytes: int, limit: int | None = None) -> None:
    """Drop the least recently used forms until `nbytes` more fit below the limit; called before a new form is kept."""
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
    # copy() is one step for other threads; a weight and its copies share one dictionary
    return list({id(owner.forms): owner.forms for owner in _owners.copy().values()}.values())
