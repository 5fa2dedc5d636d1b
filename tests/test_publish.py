import json
import os
import signal
import stat
import subprocess
import sys
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from deploykit import publish
from deploykit.errors import UsageError
from deploykit.publish import (
    OUR_FOLDERS,
    lock_folder,
    publish_folder,
    refuse_existing,
    write_atomic,
    write_json,
)

OLD = {"manifest.json": "old", "model.onnx": "old", "golden/a": "old a"}
NEW = {"manifest.json": "new", "model.onnx": "new", "golden/b": "new b", "golden/c": "new c"}


def fill(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder):
    files = {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }
    return files or None


def names(folder):
    return [path.name for path in folder.iterdir()]


def publish_new(destination, force=True):
    with publish_folder(destination, force=force) as staging:
        fill(staging, NEW)


@pytest.fixture
def destination(tmp_path):
    folder = tmp_path / "place" / "bundle[1]"  # brackets must not be taken for a pattern
    fill(folder, OLD)
    return folder


def inject(monkeypatch, owner, name, fail_at, error):
    """Make the ``fail_at``-th call of ``owner.name`` raise; return the list of its calls."""
    real, calls = getattr(owner, name), []

    def wrapper(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fail_at:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_published_folder_holds_exactly_what_was_written(tmp_path):
    publish_new(tmp_path / "made" / "on the way" / "x", force=False)
    assert content(tmp_path / "made" / "on the way" / "x") == NEW
    assert names(tmp_path / "made" / "on the way") == ["x"]


def test_force_replaces_the_whole_folder(destination):
    publish_new(destination)
    assert content(destination) == NEW
    assert names(destination.parent) == [destination.name]


def test_staging_is_hidden_and_on_the_same_file_system(destination):
    with publish_folder(destination, force=True) as staging:
        assert staging.parent == destination.parent
        assert staging.name.startswith(".")
        assert content(destination) == OLD


def test_manifest_is_synced_after_every_other_file(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(publish, "_sync", lambda path: synced.append(path.name))
    publish_new(tmp_path / "x")
    assert synced.index("manifest.json") > max(synced.index(name) for name in ("b", "c"))


def publish_and_raise(destination, error):
    with publish_folder(destination, force=True) as staging:
        fill(staging, NEW)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_failure_in_the_block_leaves_the_old_folder_and_nothing_else(destination, error):
    with pytest.raises(error):
        publish_and_raise(destination, error)
    assert content(destination) == OLD
    assert names(destination.parent) == [destination.name]


STEPS = [
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "listdir"),
    (publish, "_exchange"),
    (publish, "_sync"),
    (publish, "_sync_tree"),
    (publish, "_swap"),
    (publish, "_lock"),
]


def publish_with_faults(destination, monkeypatch, publish_it):
    """Fail at call 1, 2, 3 ... of each step; return what was visible after each failure."""
    seen = []
    for exchange in (True, False):
        for owner, name in STEPS:
            for fail_at in range(1, 30):
                with monkeypatch.context() as patch:
                    if not exchange and name != "_exchange":
                        patch.setattr(publish, "_exchange", lambda *_: False)
                    calls = inject(patch, owner, name, fail_at, OSError(28, "No space left"))
                    with suppress(UsageError):
                        publish_it(destination)
                seen.append(content(destination) if destination.exists() else None)
                publish.shutil.rmtree(destination, ignore_errors=True)
                fill(destination, OLD)
                if len(calls) < fail_at:
                    break
    return seen


def test_fault_at_every_operation_leaves_the_old_or_the_new_whole(destination, monkeypatch):
    seen = publish_with_faults(destination, monkeypatch, publish_new)
    assert len(seen) > 20
    assert all(files in (OLD, NEW) for files in seen)


def test_fault_injection_catches_a_publisher_that_writes_in_place(destination, monkeypatch):
    def in_place(folder):
        with publish.told_as_usage(folder):
            publish.shutil.rmtree(folder)
            fill(folder, NEW)
            publish._sync_tree(folder)

    seen = publish_with_faults(destination, monkeypatch, in_place)
    assert any(files not in (OLD, NEW) for files in seen)


# Waits for a number, publishes in a process of its own that is killed at that operation, and says
# how that ended: nothing has to be imported again.
KILLED = """
import os, signal, sys
from pathlib import Path
from deploykit import publish

destination, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
if not exchange:
    publish._exchange = lambda *_: False

def publish_until(fail_at):
    calls = 0

    def audit(event, arguments):  # called before every operation on files
        nonlocal calls
        if event == "open" or event.startswith("os."):
            calls += 1
            if calls == fail_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    with publish.publish_folder(destination, force=True) as staging:
        for name in ("manifest.json", "model.onnx"):
            (staging / name).write_text("new")
    os._exit(0)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        publish_until(int(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_kill_at_every_operation_leaves_the_old_or_the_new_whole(tmp_path, exchange):
    destination = tmp_path / "x"
    old, new = (dict.fromkeys(("manifest.json", "model.onnx"), text) for text in ("old", "new"))
    outcomes = set()
    command = [sys.executable, "-c", KILLED, str(destination), str(exchange)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as told:
        for fail_at in range(1, 200):
            publish.shutil.rmtree(destination, ignore_errors=True)
            fill(destination, old)
            print(fail_at, file=told.stdin, flush=True)
            code = int(told.stdout.readline())
            found = content(destination) if destination.exists() else None
            # Where the system cannot exchange, the place may be empty until the next publication.
            assert found in ((old, new) if exchange else (old, new, None))
            with publish_folder(tmp_path / "x", force=True) as staging:
                fill(staging, old)
            assert names(tmp_path) == ["x"], "the next one clears up"
            outcomes.add(code)
            if code == 0:
                break
    assert outcomes == {-signal.SIGKILL, 0}


def test_folder_set_aside_by_a_killed_process_comes_back(destination):
    destination.rename(destination.with_name(f".{destination.name}.0123abcd.old"))
    with pytest.raises(ZeroDivisionError), publish_folder(destination, force=True):
        raise ZeroDivisionError
    assert content(destination) == OLD


def test_staging_of_a_living_process_is_left_alone(destination):
    with publish_folder(destination, force=True) as first:
        fill(first, NEW)
        with publish_folder(destination, force=True) as second:
            fill(second, OLD)
        assert content(first) == NEW
    assert content(destination) == NEW


def publish_while_another_does(destination):
    with publish_folder(destination) as staging:
        fill(staging, NEW)
        fill(destination, OLD)


def test_destination_that_appears_meanwhile_is_not_replaced_without_force(tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        publish_while_another_does(tmp_path / "x")
    assert content(tmp_path / "x") == OLD


def test_existing_destination_is_refused_without_force(destination):
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        publish_new(destination, force=False)
    assert content(destination) == OLD


def make_file(path):
    path.write_text("precious")


def make_foreign_folder(path):
    fill(path, {"thesis.tex": "precious"})


def make_project(path):
    """As a user's own, where a recipe lies beside what it names."""
    fill(path, {"recipe.yaml": "schema: 1", "net.py": "precious", "data/a.png": "precious"})


def make_recipe_alone(path):
    fill(path, {"recipe.yaml": "precious"})


def make_web_app(path):
    fill(path, {"manifest.json": "{}", "index.html": "precious"})


def make_bundle_with_notes(path):
    fill(path, {**OLD, "notes.txt": "precious"})


def make_link(path):
    target = path.with_name("target")
    fill(target, OLD)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "make",
    [
        make_file,
        make_foreign_folder,
        make_project,
        make_recipe_alone,
        make_web_app,
        make_bundle_with_notes,
        make_link,
        os.mkfifo,
    ],
)
def test_force_destroys_nothing_that_deploykit_did_not_make(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UsageError, match="something else"):
        refuse_existing(tmp_path / "x", force=True)
    with pytest.raises(UsageError, match="something else"):
        publish_new(tmp_path / "x")
    assert os.path.lexists(tmp_path / "x")


def test_force_replaces_the_zip_file_of_a_bundle_alone(tmp_path):
    """A browser's extension begins with a manifest.json too."""
    for start, ours in (("{", False), ('{"digest":"0', True)):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("manifest.json", start)
        with nullcontext() if ours else pytest.raises(UsageError, match="something else"):
            refuse_existing(tmp_path / "x.zip", force=True, kind="zip")


def test_replaced_file_keeps_its_mode(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o600)
    write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


FOLDERS = {kind: dict.fromkeys(always, "precious") for kind, (always, _) in OUR_FOLDERS.items()}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("found", FOLDERS)
def test_force_replaces_a_folder_only_by_one_of_its_kind(tmp_path, kind, found):
    fill(tmp_path / "x", FOLDERS[found])
    if kind == found:
        with publish_folder(tmp_path / "x", force=True, kind=kind) as staging:
            fill(staging, NEW)
        assert content(tmp_path / "x") == NEW
        return
    told = f"expected a {kind} to replace, found a {found}; choose another place"
    with pytest.raises(UsageError, match=told):
        refuse_existing(tmp_path / "x", True, kind)
    with (
        pytest.raises(UsageError, match=told),
        publish_folder(tmp_path / "x", force=True, kind=kind),
    ):
        pass
    assert content(tmp_path / "x") == FOLDERS[found]


def test_force_accepts_an_empty_folder_but_not_one_where_a_run_begins(tmp_path):
    (tmp_path / "x").mkdir()
    refuse_existing(tmp_path / "x", force=True)
    with lock_folder(tmp_path / "x"), pytest.raises(UsageError, match="something else in it"):
        refuse_existing(tmp_path / "x", force=True)


def test_place_under_a_file_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        publish_new(tmp_path / "file" / "x")
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_write_atomic_replaces_wholly(tmp_path):
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    write_atomic(tmp_path / "a", b"one")
    inject(monkeypatch, os, name, 1, OSError(28, "No space left"))
    with pytest.raises(UsageError, match="No space left"):
        write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_file_left_by_a_killed_writer_is_cleared(tmp_path):
    (tmp_path / ".a.0123abcd.tmp").write_bytes(b"half")
    write_atomic(tmp_path / "a", b"one")
    assert names(tmp_path) == ["a"]


def test_json_is_sorted_readable_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "ü",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["b"] == 1


def start_holder(folder):
    code = (
        "import sys, time; from pathlib import Path; from deploykit.publish import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_second_process_is_told_who_holds_the_lock_and_a_killed_holder_frees_it(tmp_path):
    with start_holder(tmp_path) as holder:
        with pytest.raises(UsageError, match=f"process {holder.pid} works in it"):
            lock_folder(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            pass


def test_lock_opens_again_after_the_block(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path / "x"):
            assert Path(tmp_path / "x").is_dir()
