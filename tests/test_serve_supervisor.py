"""What a server checks before it starts, and how its swaps and snapshots behave."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from served import make_certificate, make_other
from tiny_bundle import make_bundle

from deploykit import runtime
from deploykit.errors import BundleError, DeploykitError, MissingDependency, UsageError
from deploykit.server import start
from deploykit.server.channel import Channel
from deploykit.server.listener import open_listener, turn_away, url_of
from deploykit.server.settings import Settings
from deploykit.server.snapshot import private_folder, take_snapshot
from deploykit.server.start import TOKEN, checked, count_cores, read_token, serve
from deploykit.server.swap import Swaps
from deploykit.server.tls import server_context

SOUND = Settings(bundles=("bundle",))


# Settings.


def test_settings_pass_through_json_unchanged():
    settings = replace(SOUND, cors=("https://a", "https://b"), token="secret", threads=3)
    assert Settings.from_json(settings.to_json()) == settings


def test_threads_are_the_cores_shared_out(monkeypatch):
    monkeypatch.setattr(start, "count_cores", lambda: 5)
    assert checked(SOUND).threads == 5
    assert checked(replace(SOUND, workers=2)).threads == 2
    assert checked(replace(SOUND, workers=9)).threads == 1
    assert checked(replace(SOUND, workers=9, threads=7)).threads == 7


def test_cores_are_those_of_the_process_and_of_its_group(tmp_path, monkeypatch):
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))
    second, first, none = tmp_path / "2", tmp_path / "1", tmp_path / "0"
    for folder in (second, first / "cpu", none):
        folder.mkdir(parents=True)
    for text, cores in (("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5)):
        (second / "cpu.max").write_text(text)
        assert start._quota(second) == cores
    (first / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for text, cores in (("-1\n", None), ("300000\n", 3.0)):
        (first / "cpu/cpu.cfs_quota_us").write_text(text)
        assert start._quota(first) == cores
    assert start._quota(none) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for quota, cores in ((None, 8), (1.5, 1), (0.5, 1), (3.0, 3), (64.0, 8)):
        monkeypatch.setattr(start, "_quota", lambda _root, quota=quota: quota)
        assert count_cores() == cores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bundles": ()}, "expected at least one bundle"),
        ({"port": 65536}, "--port: expected 0 to 65535, got 65536"),
        ({"port": -1}, "--port"),
        ({"workers": 0}, "--workers: expected 1 to 256, got 0"),
        ({"threads": 0}, "--threads"),
        ({"max_batch": 0}, "--max-batch: expected 1 to 4096 samples"),
        ({"window_us": -1}, "--batch-window-us"),
        ({"queue": 0}, "--queue"),
        ({"timeout_s": 0}, "--timeout"),
        ({"timeout_s": float("nan")}, "--timeout"),
        ({"max_body": 10}, "--max-body"),
        ({"max_pixels": 0}, "--max-pixels"),
        ({"grace_s": -1}, "--grace"),
        ({"grace_s": 1, "drain_s": 2}, "--drain: expected at most --grace"),
        ({"tls_cert": "a"}, "--tls-cert: expected --tls-key beside it"),
        ({"tls_key": "a"}, "--tls-key: expected --tls-cert beside it"),
        ({"cors": ("example.org",)}, "--cors-origin: expected"),
        ({"cors": ("https://a/path",)}, "--cors-origin: expected"),
    ],
)
def test_setting_that_cannot_be_used_is_told_by_its_flag(change, words):
    with pytest.raises(UsageError, match=words.replace("*", r"\*")):
        checked(replace(SOUND, **change))


def test_sound_settings_pass():
    for change in ({}, {"cors": ("*", "https://example.org:8080")}, {"port": 0}, {"drain_s": 0}):
        assert checked(replace(SOUND, **change)).workers == 1


def test_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(start, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(MissingDependency, match=r"no_such_package: pip install 'deploykit\[serve"):
        serve("bundle")


def test_thread_that_runs_other_things_is_refused(tmp_path):
    async def cell():
        serve(make_bundle(tmp_path), port=0)

    with pytest.raises(UsageError, match=r"as in a notebook.*threading.Thread"):
        asyncio.run(cell())


# The token.


def test_token_comes_from_the_file_or_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, "from-environment")
    assert read_token(None) == "from-environment"
    file = tmp_path / "token"
    file.write_text("from-file\n")
    file.chmod(0o600)
    assert read_token(file) == "from-file"
    assert capsys.readouterr().err == ""
    file.chmod(0o640)
    assert read_token(file) == "from-file"
    assert f"warning: --token-file: {file} can be read by others" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " \n", "two words", "café", "nul\0"])
def test_token_that_no_header_can_hold_is_refused(tmp_path, monkeypatch, text):
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UsageError, match=r"--token-file: .*expected a token"):
        read_token(file)
    if "\0" not in text:
        monkeypatch.setenv(TOKEN, text)
        with pytest.raises(UsageError, match=f"{TOKEN}: expected a token"):
            read_token(None)


def test_token_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match="no/such: cannot be read: No such file"):
        read_token(tmp_path / "no/such")


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return [make_certificate(tmp_path_factory.mktemp("tls")) for _ in range(2)]


def test_certificate_and_key_that_belong_are_taken(certificates):
    context = server_context(*map(str, certificates[0]))
    assert context.minimum_version.name == "TLSv1_2"
    assert {"TLSv1.2", "TLSv1.3"} == {one["protocol"] for one in context.get_ciphers()}
    older = [one["name"] for one in context.get_ciphers() if one["protocol"] == "TLSv1.2"]
    assert all(name.startswith("ECDHE-") for name in older)
    assert not any("SHA1" in name or "CBC" in name or "AES128-SHA256" in name for name in older)


def test_faults_of_a_certificate_are_told_with_a_remedy(certificates, tmp_path):
    (cert, key), (_, foreign) = certificates
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for pair, words in (
        ((cert, foreign), "is not the key of the certificate"),
        ((nothing, key), "nothing.pem: expected a certificate in PEM, found none"),
        ((cert, nothing), "nothing.pem: expected a private key in PEM, found none"),
        ((key, cert), "key.pem: expected a certificate in PEM"),
        ((tmp_path / "no.pem", key), "--tls-cert: .*no.pem: cannot be read: No such file"),
        ((cert, tmp_path), "--tls-key: .*cannot be read: Is a directory"),
    ):
        with pytest.raises(UsageError, match=words):
            server_context(*map(str, pair))


def test_encrypted_key_is_refused_rather_than_asked_about(tmp_path):
    pair = make_certificate(tmp_path, "-passout", "pass:secret")
    with pytest.raises(UsageError, match=r"without password.* openssl pkey -in"):
        server_context(*map(str, pair))


# The address.


def test_listener_is_had_where_asked_and_its_port_is_told():
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, SOUND) == f"http://127.0.0.1:{port}"
        assert not listener.getblocking()
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}: expected a free port.*--port"):
            open_listener("127.0.0.1", port)
    with pytest.raises(UsageError, match="--host: expected an address of this machine"):
        open_listener("no such host", 0)
    with pytest.raises(UsageError, match=r"192.0.2.1:0: .*--host"):
        open_listener("192.0.2.1", 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the filter is Linux's")
def test_door_that_closes_keeps_those_who_wait_and_lets_nobody_come():
    with (
        open_listener("127.0.0.1", 0) as listener,
        socket.socket(fileno=os.dup(listener.fileno())) as workers_end,
    ):
        address = listener.getsockname()
        with socket.create_connection(address, timeout=1) as early:
            early.sendall(b"hello")
            turn_away(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            early.sendall(b" again")  # what was let in still speaks
            taken, _ = workers_end.accept()
            with taken:
                taken.settimeout(1)
                assert taken.recv(99) == b"hello again"
            with pytest.raises(BlockingIOError):
                workers_end.accept()


# Snapshots.


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_snapshot_is_a_bundle_of_the_same_bytes(tmp_path):
    bundle = make_bundle(tmp_path)
    manifest = take_snapshot(bundle, tmp_path / "copy")
    assert runtime.read_bundle(tmp_path / "copy") == (manifest, runtime.read_bundle(bundle)[1])
    (bundle / "model.onnx").write_bytes(b"other")
    assert runtime.read_bundle(tmp_path / "copy")[0] == manifest
    with pytest.raises(BundleError):
        take_snapshot(bundle, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_private_folder_is_private_and_gone_at_the_end(own_tmp):
    with private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").touch()
    assert list(own_tmp.iterdir()) == []


def test_folders_of_dead_servers_are_removed_and_those_of_live_ones_are_not(own_tmp):
    foreign = own_tmp / "deploykit-serve-link"
    foreign.symlink_to(own_tmp)
    with private_folder() as live:
        dead = own_tmp / "deploykit-serve-dead"
        (dead / "start").mkdir(parents=True)
        with private_folder() as folder:
            assert not dead.exists()
            assert live.exists()
            assert folder != live
    assert [path.name for path in own_tmp.iterdir()] == [foreign.name]


def test_place_that_cannot_be_written_is_told(own_tmp, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(own_tmp / "no/such"))
    with pytest.raises(UsageError, match="TMPDIR"), private_folder():
        pass


# Swaps, with workers that only play.


class Player:
    """A worker that answers as it is told to: an error, None for no error, or by its death."""

    def __init__(self, answer: str | None = None, *, dies: bool = False, ready: bool = True):
        self.answer, self.dies, self.ready = answer, dies, ready
        self.heard: list[str] = []
        self.bundles: tuple[object, ...] = ()

    async def ask(self, do, _answer, **details):
        self.heard.append(do)
        await asyncio.sleep(0)
        if self.dies:
            return None
        return {"swap": details["swap"], "error": self.answer if do == "prepare" else None}

    def kill(self):
        self.heard.append("kill")


def swap_among(folder, players, model=None):
    """Swap the tiny bundle for another among workers; return them as a crew."""
    folder.mkdir()
    source = make_bundle(folder / "source")
    old = folder / "old"
    manifest = take_snapshot(source, old)
    make_other(folder / "source", force=True)
    crew = SimpleNamespace(workers=dict(enumerate(players)), bundles=(old,), old=old)
    crew.send = lambda do, **_details: [player.heard.append(do) for player in players]
    crew.swaps = Swaps(crew, [source], [manifest], folder)

    async def swap():
        crew.swapped = await crew.swaps.swap(model)

    crew.run = lambda: asyncio.run(swap())
    return crew


def test_swap_is_committed_once_every_worker_has_prepared(tmp_path):
    players = [Player(), Player()]
    crew = swap_among(tmp_path / "a", players)
    crew.run()
    assert [player.heard for player in players] == [["prepare", "commit"]] * 2
    assert crew.swapped == ["tiny 2.0"]
    assert runtime.read_bundle(crew.bundles[0])[0]["version"] == "2.0"
    assert not crew.old.exists()
    assert all(player.bundles == crew.bundles for player in players)


def test_one_worker_that_cannot_leaves_the_old_bundle_in_all(tmp_path):
    players = [Player(), Player("tiny: no memory")]
    crew = swap_among(tmp_path / "a", players)
    with pytest.raises(DeploykitError, match="tiny: no memory"):
        crew.run()
    assert [player.heard for player in players] == [["prepare", "discard"]] * 2
    assert crew.bundles == (crew.old,)
    assert runtime.read_bundle(crew.old)[0]["version"] == "1.0"
    assert list((tmp_path / "a").glob("swap-*")) == []


def test_worker_that_dies_or_is_still_loading_does_not_block_and_begins_with_the_new(tmp_path):
    players = [Player(), Player(dies=True), Player(ready=False)]
    crew = swap_among(tmp_path / "a", players)
    crew.run()
    assert [player.heard for player in players] == [
        ["prepare", "commit"],
        ["prepare", "kill"],
        ["kill"],
    ]
    assert runtime.read_bundle(crew.bundles[0])[0]["version"] == "2.0"


def test_bundle_that_kills_every_worker_is_not_swapped_in(tmp_path):
    crew = swap_among(tmp_path / "a", [Player(dies=True)])
    with pytest.raises(DeploykitError, match="no worker has survived"):
        crew.run()
    assert crew.bundles == (crew.old,)


def test_corrupt_bundle_reaches_no_worker(tmp_path):
    player = Player()
    crew = swap_among(tmp_path / "a", [player])
    (tmp_path / "a/source/tiny/extra").touch()
    with pytest.raises(BundleError, match="extra"):
        crew.run()
    assert player.heard == ["discard"]
    assert crew.bundles == (crew.old,)


def test_only_the_named_model_is_swapped(tmp_path):
    crew = swap_among(tmp_path / "a", [Player()], "tiny")
    crew.run()
    assert crew.swapped == ["tiny 2.0"]
    with pytest.raises(UsageError, match="expected one that is served, got 'no'"):
        swap_among(tmp_path / "b", [Player()], "no").run()


def test_swaps_wait_for_one_another(tmp_path):
    players = [Player()]
    crew = swap_among(tmp_path / "a", players)

    async def both():
        await asyncio.gather(crew.swaps.swap(), crew.swaps.swap())

    asyncio.run(both())
    assert players[0].heard == ["prepare", "commit"] * 2


# The channel.


def test_channel_carries_messages_and_tells_when_the_other_end_is_gone():
    async def talk():
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        other = await Channel.over(theirs)
        channel.send(do="ping", text="é\n")
        assert await other.receive() == {"do": "ping", "text": "é\n"}
        other.close()
        assert await channel.receive() is None
        channel.send(do="ping")  # to nobody
        channel.close()

    asyncio.run(talk())


def test_half_a_message_is_none():
    async def talk():
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        theirs.sendall(json.dumps({"event": "ready"}).encode())
        theirs.close()
        assert await channel.receive() is None
        channel.close()

    asyncio.run(talk())


# What is loaded.


@pytest.mark.parametrize("module", ["supervisor", "worker", "start"])
def test_server_loads_no_torch(module):
    code = f"import sys, deploykit.server.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "deploykit" in loaded
    assert loaded.isdisjoint({"torch", "onnx", "lightning_fabric"})


def test_bentoml_alone_asks_for_the_token_too(monkeypatch):
    from deploykit.server.service import settings_from_environment

    monkeypatch.delenv("DEPLOYKIT_SERVE", raising=False)
    monkeypatch.setenv("DEPLOYKIT_BUNDLES", "a")
    monkeypatch.delenv("DEPLOYKIT_TOKEN", raising=False)
    assert settings_from_environment().token is None
    monkeypatch.setenv("DEPLOYKIT_TOKEN", "secret")
    assert settings_from_environment().token == "secret"
