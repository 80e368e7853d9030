"""Verifying a published trail from its files alone."""

from __future__ import annotations

import functools
import http.server
import itertools
import os
import random
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.tsa import Authority

from rlhf_audit_nb.errors import KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, targets, verify_trail
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.cosignature import CosignerEd25519
from rlhf_audit_nb.trail.merkle import LeafHashes, leaf_hash, tree_root
from rlhf_audit_nb.trail.note import Note, Signer, format_vkey, parse_note, sign_note
from rlhf_audit_nb.trail.published import is_published, verify_published
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.store import pack_entries, unpack_entries
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.writer import Draft

WITNESS = CosignerEd25519("witness.example/w", Ed25519PrivateKey.from_private_bytes(bytes(32)))


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run=f"r{number % 3}")
        if number % 97 == 0:
            trail.flush()
    trail.flush()


def put(path: Path, data: bytes) -> None:
    """Change a published file as somebody does who may: what stands there is of mode 0444."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def names(published: Path) -> list[str]:
    return sorted(path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file())


@pytest.fixture
def published(folder, tmp_path):
    """A trail of 600 entries and where it was published: two full tiles, a partial one, and a tile above them."""
    with Trail.open(folder) as trail:
        grow(trail, 600)
        publish_tiles(folder, tmp_path / "www")
    return tmp_path / "www"


@pytest.fixture
def small(folder, tmp_path):
    """A trail of 12 entries in two partial tiles, where it was published, and whom to trust."""
    with Trail.open(folder) as trail:
        policy = TrustPolicy.of(trail.log_vkey)
        for size in (5, 12):
            grow(trail, size)
            publish_tiles(folder, tmp_path / "www")
    return tmp_path / "www", policy


@pytest.fixture
def serve():
    """Serve a folder on this machine; its address."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *said):
            pass

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=folder)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def faults(target, **options):
    verdict = verify_published(target, **options)
    assert verdict.level is Level.INVALID
    assert verdict.exit_code() == 40
    return [(reason.code, reason.where) for reason in verdict.reasons]


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 513])
def test_files_and_store_get_the_same_verdict(folder, tmp_path, size):
    with Trail.open(folder) as trail:
        grow(trail, size)
    publish_tiles(folder, tmp_path / "www")
    assert verify_published(tmp_path / "www") == verify_trail(folder)
    assert verify_published(tmp_path / "www").level is Level.UNANCHORED


def test_a_published_folder_is_told_from_a_store(folder, published, tmp_path):
    assert is_published(published)
    assert is_published(f"file://{published}")
    assert not is_published(folder)
    assert not is_published(str(folder))
    assert not is_published(tmp_path / "nowhere")
    assert is_published("https://example.com/trail")
    assert is_published("s3://bucket/trail")
    assert not is_published("postgresql+psycopg://host/trail")


def test_another_machine_needs_only_the_files_and_the_policy(folder, published, tmp_path):
    with Trail.open(folder) as trail:
        policy = TrustPolicy.of(trail.log_vkey)
    assert verify_published(published, policy=policy, home=tmp_path / "other").level is Level.UNANCHORED
    with pytest.raises(KeyFileError, match="policy"):
        verify_published(published, home=tmp_path / "third")


def test_a_key_that_did_not_sign_makes_it_invalid(published, tmp_path):
    with Trail.open(tmp_path / "another", home=tmp_path / "another-home") as trail:
        policy = TrustPolicy.of(trail.log_vkey)
    assert [where for _, where in faults(published, policy=policy)] == ["checkpoint"]


def test_a_run_without_an_end_is_worth_knowing_and_lowers_nothing(folder, tmp_path):
    with Trail.open(folder) as trail:
        trail.append("run.started", b"{}", run="open")
    publish_tiles(folder, tmp_path / "www")
    verdict = verify_published(tmp_path / "www")
    assert (verdict.level, verdict.exit_code()) == (Level.UNANCHORED, 0)
    assert [(reason.code, reason.where) for reason in verdict.reasons] == [("run-open", "run open")]


def test_progress_is_told(published):
    told = []
    verify_published(published, progress=lambda done, size: told.append((done, size)))
    assert told == [(256, 600), (512, 600), (600, 600)]


class TestChanged:
    def test_a_flip_in_any_file_is_found_and_its_file_or_entry_named(self, published):
        drawn = random.Random(5)
        for name in names(published):
            path, whole = published / name, (published / name).read_bytes()
            if name == "checkpoint":
                continue
            every = range(len(whole)) if len(whole) <= 64 else (drawn.randrange(len(whole)) for _ in range(8))
            for at in {0, len(whole) - 1, *every}:
                put(path, whole[:at] + bytes([whole[at] ^ 1 << drawn.randrange(8)]) + whole[at + 1 :])
                verdict = verify_published(published)
                assert verdict.level is Level.INVALID, (name, at)
                number = int(name.rsplit("/", 1)[-1]) if ".p/" not in name else 2
                near = {name, f"tile/0/{number:03d}", f"tile/0/{number:03d}.p/88"}
                assert any(item.where in near or item.where.startswith("entry ") for item in verdict.reasons), name
            put(path, whole)
        assert verify_published(published).level is Level.UNANCHORED

    def test_every_byte_and_every_truncation_of_every_file_of_a_small_trail(self, small, tmp_path):
        published, policy = small
        home = tmp_path / "other"
        for name in names(published):
            whole = (published / name).read_bytes()
            changed = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
            changed += [whole[:at] for at in range(len(whole))] + [whole + b"\0", whole + whole]
            for at, data in enumerate(changed):
                put(published / name, data)
                verdict = verify_published(published, policy=policy, home=home)
                assert verdict.level is Level.INVALID, (name, at)
                named = {item.where for item in verdict.reasons}
                assert any(name in where or where.startswith("entry ") for where in named) or "tile/0/000.p/12" in named
            put(published / name, whole)
        assert verify_published(published, policy=policy, home=home).level is Level.UNANCHORED

    def test_every_pair_of_entries_swapped_even_where_the_tiles_are_made_anew(self, small, tmp_path):
        published, policy = small
        bundle, tile = published / "tile/entries/000.p/12", published / "tile/0/000.p/12"
        whole, hashes = bundle.read_bytes(), tile.read_bytes()
        entries = unpack_entries(whole, 12)
        for one, other in itertools.combinations(range(12), 2):
            swapped = list(entries)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            put(bundle, pack_entries(swapped))
            found = faults(published, policy=policy, home=tmp_path / "other")
            assert ("tile", "tile/0/000.p/12") in found
            put(tile, b"".join(map(leaf_hash, swapped)))
            assert ("root", "checkpoint") in faults(published, policy=policy, home=tmp_path / "other")
            put(tile, hashes)
        put(bundle, whole)
        assert verify_published(published, policy=policy).level is Level.UNANCHORED

    def test_a_forger_without_the_key_who_makes_everything_anew_is_not_believed(self, folder, small, tmp_path):
        published, policy = small
        bundle, tile = published / "tile/entries/000.p/12", published / "tile/0/000.p/12"
        entries = unpack_entries(bundle.read_bytes(), 12)
        entries[7] = entries[7].replace(b'"n":7', b'"n":8')
        leaves = [leaf_hash(entry) for entry in entries]
        put(bundle, pack_entries(entries))
        put(tile, b"".join(leaves))
        old = checkpoint_of((published / "checkpoint").read_bytes())
        head = Checkpoint(old.origin, 12, tree_root(12, LeafHashes(leaves)))
        for stray in ("tile/entries/000.p/5", "tile/0/000.p/5"):
            (published / stray).unlink()
        put(
            published / "checkpoint",
            sign_note(head.format(), [Signer(old.origin, Ed25519PrivateKey.generate())]).encode(),
        )
        assert faults(published, policy=policy) == [("unsigned", "checkpoint")]
        signed = parse_note(TrailReader.open(folder).checkpoint()).signatures
        put(published / "checkpoint", Note(head.format(), signed).format().encode())
        assert faults(published, policy=policy) == [("signature", "checkpoint")]

    def test_a_flip_in_the_checkpoint_never_passes(self, published):
        path = published / "checkpoint"
        whole = path.read_bytes()
        for at in range(len(whole)):
            put(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            try:
                level = verify_published(published).level
            except KeyFileError:  # another origin: the sentence names it, and nothing was said to hold
                continue
            assert level is Level.INVALID, at

    def test_each_file_that_is_missing_is_named(self, published):
        for name in names(published):
            whole = (published / name).read_bytes()
            (published / name).unlink()
            if name == "checkpoint":
                with pytest.raises(StoreError, match="no published trail"):
                    verify_published(published)
            else:
                assert ("missing", name) in faults(published)
            put(published / name, whole)

    def test_any_two_files_exchanged_are_named(self, published):
        for one, other in itertools.combinations(names(published), 2):
            first, second = (published / one).read_bytes(), (published / other).read_bytes()
            put(published / one, second)
            put(published / other, first)
            if one == "checkpoint":
                assert faults(published) == [("checkpoint", "checkpoint")], other
            else:
                found = faults(published)
                assert any(where in (one, other) or where.startswith("entry ") for _, where in found), (one, other)
            put(published / one, first)
            put(published / other, second)
        assert verify_published(published).level is Level.UNANCHORED

    @pytest.mark.parametrize("name", ["tile/0/001", "tile/1/000.p/2", "tile/entries/000", "tile/entries/002.p/88"])
    def test_a_missing_a_cut_and_a_linked_file_are_named(self, published, tmp_path, name):
        path = published / name
        whole = path.read_bytes()
        put(path, whole[:-1])
        assert name in [where for _, where in faults(published)]
        path.unlink()
        assert ("missing", name) in faults(published)
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
        assert ("missing", name) in faults(published)

    def test_what_cannot_be_read_does_not_hide_what_comes_after_it(self, published):
        put(published / "tile/entries/000", b"nothing")
        put(published / "tile/0/001", bytes(8192))
        assert faults(published) == [("bundle", "tile/entries/000"), ("tile", "tile/0/001")]

    @pytest.mark.parametrize(
        "name",
        [
            "tile/0/003.p/0",
            "tile/0/001.p/256",
            "tile/0/001.p/01",
            "tile/0/1",
            "tile/0/x001/5",
            "tile/00/001",
            "tile/64/001",
            "tile/entries/001.gz",
            "tile/readme",
            "tile/data/000",
        ],
    )
    def test_a_file_that_no_tile_may_be_is_named(self, published, name):
        put(published / name, b"")
        assert [where for _, where in faults(published)] == [name]

    def test_what_is_not_listed_of_very_many_faults_is_counted(self, published):
        for number in range(250):
            put(published / f"tile/0/stray-{number}", b"")
        found = faults(published)
        assert [code for code, _ in found] == ["stray"] * 100 + ["more"]
        assert verify_published(published).reasons[-1].message.startswith("150 more")

    def test_a_file_whose_name_is_no_text_is_named(self, published):
        os.close(os.open(os.fsencode(published / "tile") + b"/\xff\xfe", os.O_CREAT))
        ((_, where),) = faults(published)
        assert where.encode() == rb"tile/\udcff\udcfe"


class TestWhilePublishing:
    def test_tiles_ahead_of_the_checkpoint_are_left_alone(self, folder, published):
        older = (published / "checkpoint").read_bytes()
        with Trail.open(folder) as trail:
            grow(trail, 1000)
        publish_tiles(folder, published)
        put(published / "checkpoint", older)
        for path in published.rglob("*.p/*"):
            if path.name in ("88", "2"):
                put(path, path.read_bytes())
        shutil.rmtree(Path(os.environ["RLHF_AUDIT_HOME"]) / "heads")
        verdict = verify_published(published)
        assert (verdict.level, verdict.size, verdict.reasons) == (Level.UNANCHORED, 600, ())

    def test_a_full_tile_serves_where_the_partial_one_was_dropped(self, folder, published):
        older = (published / "checkpoint").read_bytes()
        with Trail.open(folder) as trail:
            grow(trail, 800)
        assert publish_tiles(folder, published).removed == 2
        assert not (published / "tile/entries/002.p").exists()
        assert not (published / "tile/0/002.p").exists()
        shutil.rmtree(Path(os.environ["RLHF_AUDIT_HOME"]) / "heads")
        put(published / "checkpoint", older)
        verdict = verify_published(published)
        assert (verdict.level, verdict.size, verdict.reasons) == (Level.UNANCHORED, 600, ())

    def test_a_tile_ahead_that_contradicts_the_one_that_is_there_is_named(self, published):
        ahead = (published / "tile/0/002.p/88").read_bytes() + bytes(32 * 12)
        put(published / "tile/0/002.p/100", ahead)
        assert verify_published(published).level is Level.UNANCHORED
        put(published / "tile/0/002.p/100", bytes(32) + ahead[32:])
        assert faults(published) == [("tile", "tile/0/002.p/100")]

    def test_readers_find_it_whole_while_it_grows(self, folder, tmp_path):
        target, found, done = tmp_path / "www", [], threading.Event()
        with Trail.open(folder) as trail:
            grow(trail, 200)
            publish_tiles(folder, target)

            def read():
                while not done.is_set():
                    found.append(verify_published(target))

            reader = threading.Thread(target=read)
            reader.start()
            for size in range(220, 900, 37):
                grow(trail, size)
                publish_tiles(folder, target)
            done.set()
            reader.join()
        assert {(verdict.level, verdict.reasons) for verdict in found} == {(Level.UNANCHORED, ())}
        assert len({verdict.size for verdict in found}) > 1

    def test_a_partial_tile_that_a_publisher_drops_after_it_was_listed_is_no_fault(self, small, monkeypatch):
        published, policy = small
        found, dropped = targets._Folder.files, []

        def files(self, folder):
            listed = list(found(self, folder))
            for name in listed:
                if folder == "tile" and name.endswith("/000.p/5"):
                    (published / name).unlink()
                    dropped.append(name)
            return iter(listed)

        monkeypatch.setattr(targets._Folder, "files", files)
        verdict = verify_published(published, policy=policy)
        assert sorted(dropped) == ["tile/0/000.p/5", "tile/entries/000.p/5"]
        assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())

    def test_an_older_partial_tile_that_cannot_be_read_is_a_fault(self, small):
        published, policy = small
        (published / "tile/0/000.p/5").unlink()
        (published / "tile/0/000.p/5").symlink_to(published / "tile/0/000.p/12")
        assert [reason.where for reason in verify_published(published, policy=policy).reasons] == ["tile/0/000.p/5"]

    def test_an_older_partial_tile_must_be_the_beginning_of_the_one_that_is_there(self, small):
        published, policy = small
        for name in ("tile/0/000.p/5", "tile/entries/000.p/5"):
            whole = (published / name).read_bytes()
            put(published / name, whole[:-1] + b"?")
            assert faults(published, policy=policy) == [("tile", name)]
            put(published / name, whole)


class TestHistory:
    def test_an_older_copy_diverges_from_what_was_seen(self, folder, published, tmp_path):
        older = shutil.copytree(published, tmp_path / "older")
        with Trail.open(folder) as trail:
            grow(trail, 700)
        publish_tiles(folder, published)
        assert verify_published(published).level is Level.UNANCHORED
        verdict = verify_published(older)
        assert verdict.level is Level.DIVERGED
        assert [reason.code for reason in verdict.reasons] == ["rollback"]
        assert verify_published(older, home=None, policy=None).exit_code() == 30

    def test_a_folder_without_a_checkpoint_is_one_clear_sentence(self, tmp_path):
        with pytest.raises(StoreError, match="no published trail"):
            verify_published(tmp_path)

    def test_whoever_trusts_only_the_first_key_follows_the_rotations(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            first = TrustPolicy.of(trail.log_vkey)
            grow(trail, 300)
            publish_tiles(folder, tmp_path / "www")
            rotate_key(trail, "log", reason="a year has passed")
            grow(trail, 500)
            rotate_key(trail, "log")
            grow(trail, 600)
            newest = trail.log_vkey
        publish_tiles(folder, tmp_path / "www")
        for policy in (first, TrustPolicy.of(newest)):
            verdict = verify_published(tmp_path / "www", policy=policy, home=tmp_path / "other")
            assert verdict == verify_trail(folder, policy=policy, home=tmp_path / "third")
            assert (verdict.level, verdict.signers, verdict.reasons) == (Level.UNANCHORED, (newest,), ())

    def test_a_rotation_that_the_old_key_did_not_sign_is_not_followed(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 10)
        publish_tiles(folder, tmp_path / "www")
        old = checkpoint_of((tmp_path / "www/checkpoint").read_bytes())
        thief = Signer(old.origin, Ed25519PrivateKey.generate())
        put(tmp_path / "www/checkpoint", sign_note(old.format(), [thief]).encode())
        assert faults(tmp_path / "www") == [("unsigned", "checkpoint")]


def cosign(folder: Path, note: str | None = None) -> None:
    note = note or TrailReader.open(folder).checkpoint()
    anchors = AnchorFolder(folder)
    anchors.keep(note)
    parsed = parse_note(note)
    anchors.cosign(parsed.plus(WITNESS.cosign(parsed, int(time.time()))).format())


def trusting(log_vkey: str) -> TrustPolicy:
    return TrustPolicy.parse(f"log {log_vkey}\nwitness w {format_vkey(WITNESS.verifier())}\nquorum w\n")


class TestAnchors:
    @pytest.fixture
    def cosigned(self, folder, tmp_path):
        """A trail that was cosigned at 300 and at 600 entries, published, and whom to trust."""
        with Trail.open(folder) as trail:
            for size in (300, 600):
                grow(trail, size)
                cosign(folder)
            policy = trusting(trail.log_vkey)
        publish_tiles(folder, tmp_path / "www")
        return tmp_path / "www", policy

    def test_what_witnesses_have_said_is_published_with_it(self, folder, cosigned, serve, tmp_path):
        published, policy = cosigned
        for target, home in ((published, "a"), (serve(published), "b")):
            verdict = verify_published(target, policy=policy, home=tmp_path / home)
            # The published checkpoint has the witness's line, the store's newest one has not.
            assert [vkey.split("+")[0] for vkey in verdict.signers] == [verdict.origin, WITNESS.name]
            stored = verify_trail(folder, policy=policy, home=tmp_path / "c")
            assert replace(verdict, signers=stored.signers) == stored
            assert (verdict.level, verdict.exit_code()) == (Level.COSIGNED, 0)
            assert [anchor.size for anchor in verdict.anchors] == [300, 600]
        assert WITNESS.name in (published / "checkpoint").read_text()
        index = (published / "anchors/index").read_text().split()[1::2]
        assert index == ["300.checkpoint", "300.cosigned", "600.checkpoint", "600.cosigned"]
        subprocess.run(["sha256sum", "-c", "--quiet", "index"], cwd=published / "anchors", check=True)

    def test_what_comes_later_is_told_to_rest_on_the_key_alone(self, folder, cosigned, tmp_path):
        published, policy = cosigned
        with Trail.open(folder) as trail:
            grow(trail, 610)
        publish_tiles(folder, published)
        verdict = verify_published(published, policy=policy)
        assert (verdict.level, verdict.exit_code()) == (Level.UNANCHORED, 10)
        assert [reason.code for reason in verdict.reasons] == ["quorum"]
        assert "up to entry 599" in verdict.reasons[0].message
        cosign(folder)
        assert publish_tiles(folder, published).written == 4  # the checkpoint, two anchors, the index
        assert verify_published(published, policy=policy).level is Level.COSIGNED

    def test_of_many_anchors_only_what_is_new_is_looked_at_again(self, folder, tmp_path, monkeypatch):
        store = fsspec.filesystem("memory")
        with Trail.open(folder) as trail:
            for size in range(2, 32):
                grow(trail, size)
                cosign(folder)
            policy = trusting(trail.log_vkey)
        publish_tiles(folder, "memory://many/t")
        asked = []
        real = store.cat_file
        with Trail.open(folder) as trail:
            grow(trail, 40)
        cosign(folder)
        with monkeypatch.context() as patch:
            patch.setattr(store, "cat_file", lambda path, **o: (asked.append(path), real(path, **o))[1])
            assert publish_tiles(folder, "memory://many/t").written == 6  # two tiles, checkpoint, two anchors, index
        assert len([path for path in asked if "/anchors/" in path]) == 3
        verdict = verify_published("memory://many/t", policy=policy)
        assert (verdict.level, len(verdict.anchors), verdict.reasons) == (Level.COSIGNED, 31, ())
        shutil.rmtree(folder / "anchors")  # whoever publishes without them takes nothing away
        assert publish_tiles(folder, "memory://many/t").written == 0
        assert verify_published("memory://many/t", policy=policy) == verdict
        store.store.clear()

    def test_an_index_of_anchors_that_is_damaged_or_gone_lowers_nothing(self, cosigned, serve, tmp_path):
        published, policy = cosigned
        whole = (published / "anchors/index").read_bytes()
        url = serve(published)
        for data in (b"", b"\xff\n../../etc/passwd\n" + b"0" * 64 + b"  ../tile/0/000\n", whole[:30], None):
            (published / "anchors/index").unlink(missing_ok=True)
            if data is not None:
                (published / "anchors/index").write_bytes(data)
            verdict = verify_published(published, policy=policy, home=tmp_path / "other")
            assert (verdict.level, len(verdict.anchors), verdict.reasons) == (Level.COSIGNED, 2, ())
            # Where nothing can be listed, the newest checkpoint has its cosignatures all the same.
            verdict = verify_published(url, policy=policy, home=tmp_path / "other")
            assert (verdict.level, verdict.reasons) == (Level.COSIGNED, ())
        put(published / "anchors/index", whole + b"0" * 64 + b"  7.cosigned\n")
        verdict = verify_published(url, policy=policy, home=tmp_path / "other")
        assert [(item.code, item.where) for item in verdict.reasons] == [("anchor", "anchors/7.cosigned")]

    def test_a_timestamp_of_a_trusted_authority_counts(self, folder, tmp_path):
        authority = Authority.make(tmp_path / "tsa")
        authority.certify()
        with Trail.open(folder) as trail:
            grow(trail, 10)
            policy = TrustPolicy.of(trail.log_vkey)
        anchors = AnchorFolder(folder)
        anchors.stamp(10, "local", authority.stamp(anchors.keep(TrailReader.open(folder).checkpoint())))
        publish_tiles(folder, tmp_path / "www")
        verdict = verify_published(tmp_path / "www", policy=policy, tsa_roots=[authority.pem], home=tmp_path / "a")
        assert verdict == verify_trail(folder, policy=policy, tsa_roots=[authority.pem], home=tmp_path / "b")
        assert (verdict.level, verdict.reasons) == (Level.TIMESTAMPED, ())
        stranger = verify_published(tmp_path / "www", policy=policy, tsa_roots=[], home=tmp_path / "c")
        assert (stranger.level, [item.code for item in stranger.reasons]) == (Level.UNANCHORED, ["tsa-unknown"])

    def test_a_damaged_anchor_is_told_and_never_counted(self, cosigned, tmp_path):
        published, policy = cosigned
        head = parse_note((published / "checkpoint").read_bytes())
        put(published / "checkpoint", (head.text + "\n" + head.signatures[0].format() + "\n").encode())
        path = published / "anchors/600.cosigned"
        whole = path.read_bytes()
        for data in (whole[:-9] + b"AAAAAAA=\n", whole[:40], b"", None):
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)
            verdict = verify_published(published, policy=policy, home=tmp_path / "other")
            assert verdict.level is Level.UNANCHORED
            assert ("anchor", "anchors/600.cosigned") in [(item.code, item.where) for item in verdict.reasons]

    def test_an_anchor_of_another_history_makes_it_diverge(self, folder, cosigned, tmp_path):
        published, policy = cosigned
        shutil.copytree(folder, tmp_path / "fork")
        shutil.copytree(os.environ["RLHF_AUDIT_HOME"], tmp_path / "fork-home")
        with Trail.open(tmp_path / "fork", home=tmp_path / "fork-home") as fork:
            fork.append("a.b", b'{"another":"history"}')
            grow(fork, 700)
            cosign(tmp_path / "fork")
        with Trail.open(folder) as trail:
            grow(trail, 800)
        shutil.copy(tmp_path / "fork/anchors/700.cosigned", folder / "anchors")
        publish_tiles(folder, published)
        verdict = verify_published(published, policy=policy, home=tmp_path / "other")
        assert (verdict.level, [item.code for item in verdict.reasons][:1]) == (Level.DIVERGED, ["anchor-fork"])
        assert verdict.reasons[0].where == "anchors/700.cosigned"
        assert verdict.level is verify_trail(folder, policy=policy, home=tmp_path / "third").level

    def test_an_anchor_beyond_the_end_makes_it_diverge_and_is_not_published_too_early(self, folder, cosigned, tmp_path):
        published, policy = cosigned
        before = shutil.copytree(published, tmp_path / "before")
        with Trail.open(folder) as trail:
            grow(trail, 700)
            cosign(folder)
        shutil.copytree(folder / "anchors", before / "anchors", dirs_exist_ok=True)
        verdict = verify_published(before, policy=policy, home=tmp_path / "other")
        assert (verdict.level, [item.code for item in verdict.reasons]) == (Level.DIVERGED, ["rollback"])

    def test_a_publish_cut_off_anywhere_never_shows_an_anchor_before_its_checkpoint(
        self, folder, cosigned, tmp_path, monkeypatch
    ):
        published, policy = cosigned
        with Trail.open(folder) as trail:
            grow(trail, 800)
        cosign(folder)
        seen, stop = set(), 0
        while stop >= 0:
            stop += 1
            target = shutil.copytree(published, tmp_path / f"cut-{stop}")
            moved = []

            def cut_off(*args, real=os.rename, moved=moved, stop=stop, **options):
                moved.append(args)
                if len(moved) == stop:
                    raise KeyboardInterrupt
                real(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, "rename", cut_off)
                try:
                    publish_tiles(folder, target)
                    stop = -1  # it had fewer files to put
                except KeyboardInterrupt:
                    pass
            verdict = verify_published(target, policy=policy, home=tmp_path / f"home-{stop}")
            assert (verdict.level, verdict.reasons) == (Level.COSIGNED, ())
            seen.add((verdict.size, len(verdict.anchors)))
        assert seen == {(600, 2), (800, 2), (800, 3)}

    def test_an_anchor_that_came_while_publishing_waits_for_its_checkpoint(self, folder, cosigned, tmp_path):
        published, policy = cosigned
        with Trail.open(folder) as trail:
            grow(trail, 610)

            def meanwhile(what, done, size):
                if what == "written":
                    grow(trail, 620)
                    cosign(folder)

            publish_tiles(folder, published, progress=meanwhile)
        assert "620.cosigned" in AnchorFolder(folder).names()
        verdict = verify_published(published, policy=policy, home=tmp_path / "other")
        assert (verdict.level, verdict.size) == (Level.UNANCHORED, 610)
        assert [reason.code for reason in verdict.reasons] == ["quorum"]


class TestElsewhere:
    def test_ten_thousand_entries_over_http(self, folder, tmp_path, serve):
        with Trail.open(folder) as trail:
            trail.append_many(Draft("a.b", b'{"n":%d}' % number) for number in range(9_999))
        publish_tiles(folder, tmp_path / "www")
        url = serve(tmp_path / "www")
        begun = time.monotonic()
        verdict = verify_published(url)
        assert time.monotonic() - begun < 20
        assert verdict == verify_trail(folder)
        assert verdict.size == 10_000

    def test_faults_are_named_over_http_too(self, published, serve):
        url = serve(published)
        assert verify_published(url) == verify_published(published)
        whole = (published / "tile/0/001").read_bytes()
        put(published / "tile/0/001", whole[:-1] + b"?")
        assert [where for _, where in faults(url)] == ["tile/0/001"]
        (published / "tile/0/001").unlink()
        assert faults(url) == [("missing", "tile/0/001")]
        put(published / "tile/0/001", whole)
        (published / "checkpoint").unlink()
        with pytest.raises(StoreError, match="no published trail at http"):
            verify_published(url)

    def test_an_address_in_memory_gets_the_same_verdict(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 300)
            publish_tiles(folder, "memory://bucket/trail")
            grow(trail, 600)
            done = publish_tiles(folder, "memory://bucket/trail")
        assert (done.target, done.before, done.size, done.removed) == ("memory://bucket/trail", 300, 600, 2)
        assert verify_published("memory://bucket/trail") == verify_trail(folder)
        store = fsspec.filesystem("memory")
        at = "/bucket/trail/tile/1/000.p/2"
        store.pipe_file(at, store.cat_file(at)[::-1])
        assert [where for _, where in faults("memory://bucket/trail")] == ["tile/1/000.p/2", "tile/1/000.p/1"]
        store.store.clear()
