"""Folders and addresses that a trail is published to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import http.server
import os
import socketserver
import stat
import threading
import time

import fsspec
import pytest

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import targets
from rlhf_audit_nb.trail.targets import is_url, open_target, put_all, read_ahead


@pytest.fixture
def trail(tmp_path):
    """A folder that stands for the trail's."""
    (tmp_path / "trail").mkdir()
    return tmp_path / "trail"


@pytest.fixture(params=["folder", "file", "memory"])
def target(request, tmp_path):
    """The same files three ways."""
    place = {"folder": tmp_path / "www", "file": f"file://{tmp_path}/www", "memory": f"memory://{tmp_path.name}/www"}
    yield open_target(place[request.param])
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def served(tmp_path):
    """A folder, and where a web server on this machine serves it."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def refused(call, *args) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call(*args)
    assert caught.value.next_step
    return caught.value


def test_what_was_put_is_read_and_listed(target, trail):
    with target.publishing(trail) as cut_off:
        assert not cut_off
        assert put_all(target, [(f"tile/0/{number:03d}", bytes([number])) for number in range(5)]) == 5
        target.replace("checkpoint", b"one")
        target.replace("checkpoint", b"two")
    assert target.read("checkpoint", 10) == b"two"
    assert list(read_ahead(target, [("tile/0/003", 1), ("tile/0/009", 1), ("checkpoint", 2)])) == [b"\3", None, None]
    assert sorted(target.files("tile")) == [f"tile/0/00{number}" for number in range(5)]
    assert list(target.files("nothing")) == []
    assert list(target.files(".publishing")) == []


def test_what_is_there_is_compared_and_never_overwritten(target, trail):
    with target.publishing(trail):
        assert target.put_new("tile/0/000", b"abc")
        assert not target.put_new("tile/0/000", b"abc")
        for other in (b"abd", b"ab", b"abcd", b""):
            error = refused(target.put_new, "tile/0/000", other)
            assert error.reason == "diverged"
            assert "tile/0/000" in error.message
        assert target.read("tile/0/000", 10) == b"abc"


def test_a_file_larger_than_expected_is_not_read(target, trail):
    with target.publishing(trail):
        target.put_new("a", b"12345")
    assert target.read("a", 5) == b"12345"
    assert target.read("a", 4) is None


def test_a_file_can_be_taken_away_with_the_folder_that_it_leaves_empty(target, trail):
    with target.publishing(trail):
        target.put_new("tile/0/000.p/1", b"a")
        target.put_new("tile/0/000.p/2", b"b")
        for name in ("tile/0/000.p/1", "tile/0/000.p/1", "tile/0/000.p/2", "never/there"):
            target.remove(name)
    assert list(target.files("tile")) == []


def test_a_publish_that_was_cut_off_is_seen_by_the_next_and_what_it_left_is_removed(target, trail):
    with pytest.raises(KeyboardInterrupt), target.publishing(trail):
        target.put_new("tile/0/000", b"abc")
        raise KeyboardInterrupt
    with target.publishing(trail) as cut_off:
        assert cut_off
        target.put_new("tile/0/000", b"abc")
    with target.publishing(trail) as cut_off:
        assert not cut_off
    assert list(target.files(".publishing")) == []


def test_only_one_publishes_at_a_time(target, trail):
    with target.publishing(trail):
        error = refused(open_target(str(target.name)).publishing(trail).__enter__)
        assert error.reason == "in-use"
        assert target.name in error.message
    with target.publishing(trail):
        pass


def test_a_lock_that_a_dead_process_held_holds_nobody_up(tmp_path, trail):
    target = open_target(tmp_path / "www")
    pid = os.fork()
    if pid == 0:
        target.publishing(trail).__enter__()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with target.publishing(trail):
        target.put_new("a", b"a")


def test_a_file_system_without_locks_is_published_to_all_the_same(tmp_path, trail, monkeypatch):
    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with open_target(tmp_path / "www").publishing(trail):
        pass


class TestFolder:
    def test_files_that_never_change_cannot_be_written_by_accident(self, tmp_path, trail):
        target = open_target(tmp_path / "www")
        with target.publishing(trail):
            target.put_new("tile/0/000", b"a")
            target.replace("checkpoint", b"a")
        assert stat.S_IMODE((tmp_path / "www/tile/0/000").stat().st_mode) & 0o222 == 0
        assert stat.S_IMODE((tmp_path / "www/checkpoint").stat().st_mode) & 0o200

    def test_nothing_is_written_or_read_through_a_link(self, tmp_path, trail):
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "000").write_bytes(b"abc")
        (tmp_path / "www/tile").mkdir(parents=True)
        (tmp_path / "www/tile/0").symlink_to(outside)
        (tmp_path / "www/tile/1").mkdir()
        (tmp_path / "www/tile/1/000").symlink_to(outside / "000")
        target = open_target(tmp_path / "www")
        with target.publishing(trail):
            for name in ("tile/0/000", "tile/0/001", "tile/1/000"):
                error = refused(target.put_new, name, b"abc")
                assert error.reason == "link", name
                assert "www/tile/" in error.message
                assert target.read(name, 10) is None
        assert sorted(target.files("tile")) == ["tile/0", "tile/1/000"]
        assert [path.name for path in outside.iterdir()] == ["000"]

    def test_the_folder_itself_may_be_reached_through_a_link(self, tmp_path, trail):
        (tmp_path / "real").mkdir()
        (tmp_path / "www").symlink_to(tmp_path / "real")
        with open_target(tmp_path / "www").publishing(trail) as _:
            open_target(tmp_path / "www").put_new("a", b"a")
        assert (tmp_path / "real/a").read_bytes() == b"a"

    @pytest.mark.parametrize(
        ("number", "reason", "words"),
        [
            (errno.ENOSPC, "disk-full", "the disk is full"),
            (errno.EDQUOT, "disk-full", "the disk is full"),
            (errno.EROFS, "read-only", "Read-only file system"),
            (errno.EIO, "publish", "Input/output error"),
        ],
    )
    def test_a_refusal_of_the_system_is_one_sentence_and_leaves_nothing(
        self, tmp_path, trail, monkeypatch, number, reason, words
    ):
        target = open_target(tmp_path / "www")

        def fail(descriptor, data):
            raise OSError(number, os.strerror(number))

        with target.publishing(trail):
            monkeypatch.setattr(os, "write", fail)
            error = refused(target.put_new, "tile/0/000", b"abc")
            monkeypatch.undo()
            assert error.reason == reason
            assert words in error.message
            assert str(tmp_path / "www/tile/0/000") in error.message
            assert list(target.files("tile")) == []
            assert list(target.files(".publishing")) == []

    def test_a_target_that_is_a_file_is_refused(self, tmp_path, trail):
        (tmp_path / "www").write_text("mine")
        said = refused(open_target(tmp_path / "www").publishing(trail).__enter__).message
        assert "www cannot be written: no folder" in said
        assert (tmp_path / "www").read_text() == "mine"

    def test_a_device_and_a_pipe_are_no_files(self, tmp_path):
        (tmp_path / "www").mkdir()
        os.mkfifo(tmp_path / "www/checkpoint")
        (tmp_path / "www/folder").mkdir()
        target = open_target(tmp_path / "www")
        assert target.read("checkpoint", 10) is None
        assert target.read("folder", 10) is None
        assert target.read("checkpoint/below", 10) is None


class TestAddress:
    def test_paths_and_addresses_are_told_apart(self, tmp_path):
        assert is_url("s3://bucket/folder")
        assert not is_url("www")
        assert not is_url(tmp_path)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("https://user:s3cret@example.com/t?sig=t0ken#f", "https://example.com/t"),
            ("https://t0ken@example.com/t/", "https://example.com/t"),
            ("https://user:p%40ss@example.com/t", "https://example.com/t"),
            ("https://example.com/t", "https://example.com/t"),
        ],
    )
    def test_what_may_be_secret_in_an_address_is_not_shown(self, url, shown):
        target = open_target(url)
        assert target.name == shown
        error = refused(target.replace, "checkpoint", b"a")
        assert shown in error.message

    def test_a_container_of_a_storage_account_is_no_secret(self, monkeypatch):
        fsspec.register_implementation("abfs", "fsspec.implementations.memory.MemoryFileSystem", clobber=True)
        assert open_target("abfs://container@account.example/t").name == "abfs://container@account.example/t"

    def test_an_error_of_a_package_is_told_without_secrets(self, monkeypatch):
        fs = fsspec.filesystem("memory")
        target = open_target("memory://user:s3cret@place/t?sig=t0ken")

        def fail(path, **options):
            raise ConnectionError("refused by user:s3cret with t0ken and s3cret")

        monkeypatch.setattr(fs, "cat_file", fail)
        error = refused(target.read, "checkpoint", 10)
        assert error.reason == "unreachable"
        assert "refused by *** with *** and ***" in error.message
        assert error.__cause__ is None
        assert error.__suppress_context__

    @pytest.mark.parametrize(
        ("url", "reason", "words"),
        [
            ("nonsense://place/t", "url", "nonsense"),
            ("simplecache::https://u:s3cret@example.com/t", "url", "::"),
            ("https://example.com/a b", "url", "spaces"),
            ("https://example.com:port/t", "url", "not an address"),
        ],
    )
    def test_an_address_that_cannot_be_used_is_one_sentence(self, url, reason, words):
        error = refused(open_target, url)
        assert error.reason == reason
        assert words in error.message
        assert "s3cret" not in str(error)

    def test_a_missing_package_is_named(self, monkeypatch):
        import fsspec.core

        def missing(url, **options):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
        error = refused(open_target, "s3://bucket/t")
        assert error.reason == "unsupported"
        assert "s3fs" in error.message

    def test_a_store_without_conditional_puts_is_published_to(self, monkeypatch, trail):
        target = open_target("memory://plain/t")
        fs = fsspec.filesystem("memory")
        put = fs.pipe_file

        def plain(path, value, mode="overwrite"):
            if mode == "create":
                raise OSError(errno.ENOSYS, "not implemented")
            put(path, value)

        monkeypatch.setattr(fs, "pipe_file", plain)
        with target.publishing(trail):
            assert target.put_new("a", b"a")
            assert not target.put_new("a", b"a")
            assert refused(target.put_new, "a", b"b").reason == "diverged"
        fs.store.clear()

    def test_somebody_who_puts_the_same_name_first_is_compared_with(self, monkeypatch, trail):
        fs = fsspec.filesystem("memory")
        for theirs, fails in ((b"a", False), (b"b", True)):
            target = open_target("memory://race/t")
            put = type(fs).pipe_file

            def late(path, value, mode="overwrite", theirs=theirs, put=put):
                if mode == "create":
                    put(fs, path, theirs)
                put(fs, path, value, mode=mode)

            monkeypatch.setattr(fs, "pipe_file", late)
            with target.publishing(trail):
                if fails:
                    assert refused(target.put_new, "x", b"a").reason == "diverged"
                else:
                    assert not target.put_new("x", b"a")
            monkeypatch.undo()
            fs.store.clear()


class TestWeb:
    def test_files_are_read_from_a_web_server(self, served):
        folder, url = served
        (folder / "tile/0").mkdir(parents=True)
        for number in range(100):
            (folder / f"tile/0/{number:03d}").write_bytes(bytes([number]) * 1000)
        target = open_target(url + "/")
        wanted = [(f"tile/0/{number:03d}", 1000) for number in range(101)]
        found = list(read_ahead(target, wanted))
        assert found == [*(bytes([number]) * 1000 for number in range(100)), None]
        assert target.read("tile/0/001", 999) is None
        assert not target.lists

    def test_a_web_server_is_read_only(self, served, trail):
        target = open_target(served[1])
        for call in (
            lambda: target.put_new("a", b"a"),
            lambda: target.replace("a", b"a"),
            lambda: target.remove("a"),
            lambda: target.publishing(trail),
        ):
            assert refused(call).reason == "read-only"

    def test_a_server_that_is_not_there_is_one_sentence(self, monkeypatch):
        monkeypatch.setattr(targets.time, "sleep", lambda seconds: None)
        error = refused(open_target("http://user:s3cret@127.0.0.1:9/t").read, "checkpoint", 10)
        assert error.reason == "unreachable"
        assert "http://127.0.0.1:9/t/checkpoint" in error.message
        assert "s3cret" not in str(error)

    @pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\n\r\n"])
    def test_a_server_that_sends_a_byte_now_and_then_is_let_go(self, head, monkeypatch):
        monkeypatch.setattr(targets, "_PATIENCE", 0.3)
        monkeypatch.setattr(targets.time, "sleep", lambda seconds: None)

        class Dripping(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    self.request.recv(4096)
                    self.request.sendall(head)
                    while not over.wait(0.02):
                        self.request.sendall(b"x")

        over = threading.Event()
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        begun = time.monotonic()
        error = refused(open_target(f"http://127.0.0.1:{server.server_address[1]}/t").read, "checkpoint", 1000)
        assert (error.reason, time.monotonic() - begun < 10) == ("unreachable", True)
        over.set()
        server.shutdown()
        server.server_close()

    def test_a_server_that_fails_once_is_asked_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(targets.time, "sleep", lambda seconds: None)
        asked = []

        class Moody(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(503 if len(asked) < 3 else 200)
                self.end_headers()
                self.wfile.write(b"yes")

            def log_message(self, *said):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Moody)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/t?sig=t0ken"
        assert open_target(url).read("checkpoint", 10) == b"yes"
        assert asked == ["/t/checkpoint?sig=t0ken"] * 3
        asked[:] = []
        server.RequestHandlerClass.do_GET = lambda self: (asked.append(1), self.send_response(500), self.end_headers())
        error = refused(open_target(url).read, "checkpoint", 10)
        assert "t0ken" not in str(error)
        assert len(asked) == 3
        server.shutdown()
        server.server_close()
