"""Names and calls that wait for an import, with packages made for these tests."""

import copy
import importlib
import importlib.util
import pickle
import subprocess
import sys
import threading
import zipfile

import pytest

from replknet import imports
from replknet.imports import after_import

THEIRS = "theirs_for_a_test"
OURS = "ours_for_a_test"


@pytest.fixture(autouse=True)
def _nothing_waits(monkeypatch):
    """No call waits at first, and no package of these tests stays imported."""
    monkeypatch.setattr(imports, "_waiting", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not imports._FINDER])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in (THEIRS, OURS, "__phello__")]:
        del sys.modules[name]


@pytest.fixture
def events(monkeypatch):
    """What happened, in its order; the packages of these tests write into it."""
    found = []
    monkeypatch.setattr(sys, "events_of_a_test", found, raising=False)
    return found


@pytest.fixture
def packages(events, tmp_path, monkeypatch):
    """Writes packages of one file each into a folder of the search path."""

    def write(**sources):
        for name, source in sources.items():
            folder = tmp_path / {"theirs": THEIRS, "ours": OURS}[name]
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").write_text(f"import sys\nevents = sys.events_of_a_test\n{source}\n")
            (folder / "part.py").write_text("value = 1\n")
        importlib.invalidate_caches()
        return tmp_path

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_a_name_is_imported_when_it_is_asked_for(packages):
    packages(
        ours="from replknet.imports import lazy_names\n"
        f"homes = {{'value': '{OURS}.part', 'part': '{OURS}.part'}}\n"
        "__getattr__, __dir__ = lazy_names(__name__, homes)"
    )
    package = importlib.import_module(OURS)
    assert {"value", "part", "homes"} <= set(dir(package))
    assert f"{OURS}.part" not in sys.modules
    assert package.value == 1
    assert package.part is sys.modules[f"{OURS}.part"]
    # from now on it is an attribute as any other
    assert vars(package)["value"] == 1
    with pytest.raises(AttributeError, match=f"module '{OURS}' has no attribute 'valeu'") as error:
        _ = package.valeu
    # what Python needs for "Did you mean: 'value'?"
    assert (error.value.name, error.value.obj) == ("valeu", package)


# ---- calls


def is_waiting():
    return imports._FINDER in sys.meta_path


def test_what_is_imported_is_not_waited_for(events):
    after_import("json", lambda: events.append("called"))
    assert events == ["called"]
    assert not is_waiting()


@pytest.mark.parametrize(
    "statement",
    [
        f"import {THEIRS}",
        f"from {THEIRS} import value",
        f"from {THEIRS} import part",
        f"from {THEIRS}.part import value",
        f"import {THEIRS}.part as part",
        f"import importlib; importlib.import_module('{THEIRS}.part')",
        f"__import__('{THEIRS}')",
    ],
)
def test_the_call_comes_once_and_after_the_package_whatever_imports_it(statement, events, packages):
    packages(theirs="value = 1; events.append('ran')")
    after_import(THEIRS, lambda: events.append("called"))
    assert is_waiting()
    exec(statement, {})
    exec(statement, {})
    assert events == ["ran", "called"]
    assert not is_waiting()


def test_a_module_of_a_package_can_be_waited_for(events, packages):
    packages(theirs="")
    after_import(f"{THEIRS}.part", lambda: events.append("called"))
    importlib.import_module(THEIRS)
    assert events == []
    importlib.import_module(f"{THEIRS}.part")
    assert events == ["called"]


def test_several_calls_and_packages_wait_side_by_side(events, packages):
    packages(theirs="", ours="")
    for package, name in ((THEIRS, "a"), (OURS, "b"), (THEIRS, "c")):
        after_import(package, lambda name=name: events.append(name))
    importlib.import_module(THEIRS)
    assert events == ["a", "c"]
    assert is_waiting()
    importlib.import_module(OURS)
    assert events == ["a", "c", "b"]
    assert not is_waiting()


def test_a_package_sees_its_own_loader_while_it_runs_and_afterwards(events, packages):
    packages(theirs="events += [type(__loader__).__name__, type(__spec__.loader).__name__]")
    after_import(THEIRS, list)
    package = importlib.import_module(THEIRS)
    ordinary = "SourceFileLoader"
    assert events == [ordinary, ordinary]
    assert type(package.__loader__).__name__ == type(package.__spec__.loader).__name__ == ordinary


def test_looking_for_a_package_leaves_the_call_waiting(events, packages):
    packages(theirs="")
    after_import(THEIRS, lambda: events.append("called"))
    for _ in range(2):
        spec = importlib.util.find_spec(THEIRS)
        assert spec.loader.get_filename(THEIRS) == spec.origin
    assert events == []
    assert importlib.import_module(THEIRS).__file__ == spec.origin
    assert events == ["called"]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_a_copy_of_what_was_found_is_whole(again, packages):
    packages(theirs="")
    after_import(THEIRS, list)
    spec = importlib.util.find_spec(THEIRS)
    assert again(spec).loader.get_source(THEIRS) == spec.loader.get_source(THEIRS)


def test_an_import_that_fails_is_waited_for_again(events, packages):
    packages(theirs="events.append('ran'); assert len(events) > 1")
    after_import(THEIRS, lambda: events.append("called"))
    with pytest.raises(AssertionError):
        importlib.import_module(THEIRS)
    importlib.import_module(THEIRS)
    assert events == ["ran", "ran", "called"]


def test_an_error_of_the_call_reaches_who_imports(packages):
    packages(theirs="")

    def call():
        raise RuntimeError("what went wrong")

    after_import(THEIRS, call)
    with pytest.raises(RuntimeError, match="what went wrong"):
        importlib.import_module(THEIRS)
    # it is made once: the package itself is sound
    importlib.import_module(THEIRS)


def test_a_reload_makes_no_second_call(events, packages):
    packages(theirs="events.append('ran')")
    after_import(THEIRS, lambda: events.append("called"))
    importlib.reload(importlib.import_module(THEIRS))
    assert events == ["ran", "called", "ran"]


def test_a_package_in_a_zip_file_is_waited_for(events, packages, monkeypatch):
    folder = packages(theirs="events.append(type(__loader__).__name__)")
    with zipfile.ZipFile(folder / "theirs.zip", "w") as archive:
        archive.write(folder / THEIRS / "__init__.py", f"{THEIRS}/__init__.py")
    monkeypatch.syspath_prepend(folder / "theirs.zip")
    after_import(THEIRS, lambda: events.append("called"))
    assert importlib.import_module(THEIRS).__file__.startswith(str(folder / "theirs.zip"))
    assert events == ["zipimporter", "called"]


def test_a_frozen_package_is_waited_for(events):
    # one that every Python has for its own tests
    after_import("__phello__", lambda: events.append("called"))
    package = importlib.import_module("__phello__")
    assert package.__spec__.origin == "frozen"
    assert events == ["called"]


def test_a_folder_that_is_no_package_is_imported_without_a_call(events, tmp_path, monkeypatch):
    (tmp_path / THEIRS).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    after_import(THEIRS, lambda: events.append("called"))
    assert list(importlib.import_module(THEIRS).__path__) == [str(tmp_path / THEIRS)]
    assert events == []


def test_a_package_that_is_not_there_is_missed_as_always():
    after_import(THEIRS, list)
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{THEIRS}'"):
        importlib.import_module(THEIRS)


# ---- others on sys.meta_path


class Watching:
    """A finder of somebody else, which puts its own loader around the one that Python would take."""

    def __init__(self, events):
        self.events, self.looking = events, False

    def find_spec(self, name, path=None, target=None):
        if name != THEIRS or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        spec.loader = Around(spec.loader, self.events)
        return spec


class Around:
    def __init__(self, loader, events):
        self.loader, self.events = loader, events

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.events.append("watched")


@pytest.mark.parametrize("first", [True, False])
def test_a_finder_of_others_works_before_ours_and_behind_it(first, events, packages):
    packages(theirs="events.append('ran')")
    if not first:
        sys.meta_path.insert(0, Watching(events))
    after_import(THEIRS, lambda: events.append("called"))
    if first:
        sys.meta_path.insert(0, Watching(events))
    package = importlib.import_module(THEIRS)
    assert sorted(events) == ["called", "ran", "watched"]
    assert events[0] == "ran"
    assert type(package.__spec__.loader) is Around


def test_a_finder_of_the_old_kind_is_passed_by(events, packages):
    packages(theirs="")
    sys.meta_path.insert(0, object())
    after_import(THEIRS, lambda: events.append("called"))
    importlib.import_module(THEIRS)
    assert events == ["called"]


# ---- circles


@pytest.mark.parametrize("first", [THEIRS, OURS])
def test_a_call_that_imports_its_own_importer_runs_everything_once(first, events, packages):
    packages(theirs="events.append('theirs')", ours=f"events.append('ours'); import {THEIRS}; events.append('end')")
    after_import(THEIRS, lambda: exec(f"import {OURS}; events.append('called')", {"events": events}))
    importlib.import_module(first)
    expected = {
        # ours imports theirs at its head, and the call finds ours half-way
        OURS: ["ours", "theirs", "called", "end"],
        THEIRS: ["theirs", "ours", "end", "called"],
    }
    assert events == expected[first]
    assert not is_waiting()


@pytest.mark.parametrize("late", [THEIRS, OURS])
def test_two_threads_that_import_from_both_ends_both_arrive(late, packages, tmp_path):
    wait = {name: "sys.met.wait(20); " + ("time.sleep(0.2)" if name == late else "") for name in (THEIRS, OURS)}
    packages(
        theirs=f"import time; {wait[THEIRS]}\nevents.append('theirs')",
        ours=f"import time; {wait[OURS]}\nimport {THEIRS}; events.append('ours')",
    )
    program = f"""
import sys
sys.path[:] = {[str(tmp_path), *sys.path]}
import threading
from replknet.imports import after_import

def call():
    import {OURS}

sys.events_of_a_test, sys.met, errors = [], threading.Barrier(2), []
threading.excepthook = lambda args: errors.append(repr(args.exc_value))
after_import({THEIRS!r}, call)
threads = [threading.Thread(target=exec, args=(f"import {{name}}", {{}})) for name in ({THEIRS!r}, {OURS!r})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors, sys.events_of_a_test)
"""
    # in a process of its own, which a lock that is never given back would hang
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "[] ['theirs', 'ours']\n", result.stderr


def test_a_package_that_another_thread_is_half_way_through_is_waited_for_by_the_import(events, packages, monkeypatch):
    monkeypatch.setattr(sys, "inside", threading.Event(), raising=False)
    monkeypatch.setattr(sys, "go_on", threading.Event(), raising=False)
    packages(theirs="sys.inside.set(); sys.go_on.wait(20); value = 1")
    thread = threading.Thread(target=importlib.import_module, args=(THEIRS,))
    thread.start()
    assert sys.inside.wait(20)

    def call():
        sys.go_on.set()
        exec(f"from {THEIRS} import value; events.append(value)", {"events": events})

    after_import(THEIRS, call)
    thread.join()
    assert events == [1]
