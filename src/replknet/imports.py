"""Imports that wait: our own names until somebody asks for them, our calls until another package is imported.

`lazy_names` is for our packages. `after_import` is for calls that need a package which takes long to import.

timm takes two seconds, and the operator alone does not need it. So `import replknet` imports no timm. It asks for a
call once timm is there, and this call registers our networks. If timm is imported already, the call is made at once.
Else a finder on `sys.meta_path` waits for timm. It lets the other finders find timm, and puts a loader around theirs.
That loader makes the call after timm has run.

What may happen, and what then:

- **We import the package ourselves.** `replknet.models` imports timm at its head. The call that follows imports
  `replknet.models`, which is in `sys.modules` already, half-way. Python hands it out as it is, and the import outside
  goes on. Every module runs once, so nothing is registered twice and nothing recurs.
- **Another thread is half-way through it.** The package counts as imported. Our call imports it too, and Python lets
  that import wait for the other thread. An import of a part, such as `timm.data`, does not wait, and fails where the
  parts import each other, as timm's do. So `replknet.models` and `replknet.data` import the whole first.
- **Two threads import it and us from both ends.** One holds timm's lock and wants ours, the other the reverse. Python
  sees the circle and gives one of them a module that has not finished. By then timm itself has run. Only the `import`
  statement does this, so a call must use it: `importlib.import_module` raises an error. The thread that imported timm
  may go on before the other one has registered.
- **Somebody looks without importing**, as `importlib.util.find_spec("timm")` does. The finder stays, and the loader
  that it hands out has all attributes of the real one. A pickle of it is a pickle of the real one.
- **The import fails.** The finder stays and waits for the next attempt.
- **The package comes from a zip file or is frozen.** Any finder may find it and any loader may run it.
- **Others watch imports, too.** A loader of theirs around ours stays in place, and a second loader of ours around
  theirs finds nothing left to do.
- **The package is reloaded.** The finder is gone by then. A reload of timm keeps timm's registry, which is in a module
  of its own. A reload of replknet asks again and finds timm imported.

Before the package runs, the loader puts the real one in its own place, so that resources, `inspect` and pickles meet an
ordinary module. When nothing is waited for, the finder leaves `sys.meta_path`. It leaves by a new list: a thread that
walks along the old one would skip a finder if an entry went.

One gap is left. A thread may be looking for timm, without having found it, at the moment when another thread asks here.
It then misses the finder.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    A type checker does not follow them. So the package repeats the names as imports under `if TYPE_CHECKING:`.

    Args:
        package: its dotted name.
        homes: name -> the module that has it. The module itself is meant where it is `package.name`.

    Returns:
        Both functions.
    """

    def get(name: str) -> object:
        module = sys.modules[package]
        if name not in homes:
            # with the module Python can say which name is near
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        home = import_module(homes[name])
        found = home if home.__name__ == f"{package}.{name}" else getattr(home, name)
        # Python finds it by itself the next time
        setattr(module, name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


# package -> what to call once it is imported
_waiting: dict[str, tuple[Callable[[], object], ...]] = {}


def after_import(package: str, call: Callable[[], object]) -> None:
    """Make a call as soon as a package is imported, now if it is.

    Args:
        package: its name, or the dotted name of a module.
        call: made once, in the thread that imports the package. It uses `import` statements and not
            `importlib.import_module`.
    """
    _waiting[package] = (*_waiting.get(package, ()), call)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # looked at last: another thread may have imported it meanwhile
    if package in sys.modules:
        _call(package)


def _call(package: str) -> None:
    calls = _waiting.pop(package, ())
    if not _waiting:
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _FINDER]
    for call in calls:
        call()


class _Finder:
    """Finds what is waited for, as the other finders do, and changes the loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in tuple(sys.meta_path):
            # Python itself passes by a finder without this method
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                # a folder without __init__.py has no loader and is no package that anybody waits for
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Another loader, after which the calls are made."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def exec_module(self, module: Any) -> None:
        spec = module.__spec__
        if spec.loader is self:
            spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _call(spec.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (self._loader,)


def _itself(loader: Any) -> Any:
    return loader


_FINDER: Any = _Finder()
