"""Publishing, checked by a verifier that shares no code with the package."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import metamorphic_log
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import Trail, TrailReader, tiles
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.merkle import LeafHashes, prove_inclusion
from rlhf_audit_nb.trail.note import parse_note
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.tiles import TileName, parse_tile_path, publish_tiles, tile_path
from rlhf_audit_nb.trail.verdict import Level
from rlhf_audit_nb.trail.writer import Draft

SHARED = Path(os.environ.get("RLHF_AUDIT_SHARED") or Path(__file__).parents[3] / "shared")
CHECKER = SHARED / "check" / "check_tiles.py"


@pytest.fixture(scope="module")
def checker():
    if not CHECKER.is_file():
        pytest.skip(f"the independent verifier is not at {CHECKER} (RLHF_AUDIT_SHARED names its folder)")
    return CHECKER


def check(checker, folder, vkey, *more) -> subprocess.CompletedProcess:
    command = [sys.executable, str(checker), str(folder), "--vkey", vkey, *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def accepted(checker, folder, vkey, *more) -> str:
    done = check(checker, folder, vkey, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")
        if number % 97 == 0:
            trail.flush()
    trail.flush()


def fill(trail: Trail, size: int) -> None:
    trail.append_many(Draft("a.b", b'{"n":%d}' % number) for number in range(trail.reader().size, size))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestNames:
    @pytest.mark.parametrize(
        ("number", "width", "path"),
        [
            (0, 256, "tile/0/000"),
            (273, 112, "tile/0/273.p/112"),
            (1234067, 256, "tile/0/x001/x234/067"),
            (1000, 1, "tile/0/x001/000.p/1"),
        ],
    )
    def test_tiles_are_named_as_the_specification_says(self, number, width, path):
        assert tile_path(0, number, width) == path

    @given(
        st.integers(0, 63) | st.just("entries"),
        st.integers(0, 300) | st.integers(0, 10**18),
        st.integers(1, 256),
    )
    def test_a_name_is_read_back_as_it_was_written(self, level, number, width):
        name = TileName(level, number, width)
        assert parse_tile_path(name.path) == name

    @settings(max_examples=200)
    @given(st.from_regex(r"tile/[0-9a-z]{1,3}/(x?[0-9]{0,4}/){0,3}[0-9]{0,4}(\.p/?[0-9]{0,4})?", fullmatch=True))
    def test_a_name_is_read_only_in_its_one_form(self, path):
        name = parse_tile_path(path)
        assert name is None or name.path == path

    @pytest.mark.parametrize(
        "path",
        [
            "tile/0/000.p/0",
            "tile/0/000.p/256",
            "tile/0/000.p/01",
            "tile/0/x000/001",
            "tile/00/000",
            "tile/64/000",
            "tile/-1/000",
            "tile/0/0000",
            "tile/0/٠٠٠",
            "tile/0/000\n",
            "tile/0/000.p/1/2",
            "checkpoint",
        ],
    )
    def test_another_form_is_no_tile(self, path):
        assert parse_tile_path(path) is None


class TestIndependently:
    @pytest.mark.parametrize("size", [1, 255, 256, 257, 513])
    def test_an_independent_verifier_accepts_what_is_published(self, folder, tmp_path, checker, size):
        with Trail.open(folder) as trail:
            grow(trail, size)
            published = publish_tiles(folder, tmp_path / "www")
            assert published.size == size
            assert f"{size} entries" in accepted(checker, tmp_path / "www", trail.log_vkey)

    @pytest.mark.parametrize("steps", [(70_000,), (200, 65_700, 70_000)], ids=str)
    def test_a_long_trail_reaches_the_second_level_in_one_step_or_in_several(self, folder, tmp_path, checker, steps):
        with Trail.open(folder) as trail:
            for size in steps:
                fill(trail, size)
                publish_tiles(folder, tmp_path / "www")
            accepted(checker, tmp_path / "www", trail.log_vkey)
        assert (tmp_path / "www/tile/1/000").stat().st_size == 8192
        assert (tmp_path / "www/tile/2/000.p/1").stat().st_size == 32
        assert (tmp_path / "www/tile/1/001.p/17").stat().st_size == 32 * 17
        assert (tmp_path / "www/tile/0/273.p/112").stat().st_size == 32 * 112

    def test_the_published_checkpoint_and_its_proofs_hold_for_another_library(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 600)
            publish_tiles(folder, tmp_path / "www")
            vkey = trail.log_vkey
        note = (tmp_path / "www/checkpoint").read_text()
        assert metamorphic_log.checkpoint_verify(note, [vkey]).size == 600
        tiles = [(tmp_path / "www/tile" / name).read_bytes() for name in ("0/000", "0/001", "0/002.p/88")]
        leaves = [joined[at : at + 32] for joined in tiles for at in range(0, len(joined), 32)]
        for index in (0, 255, 256, 511, 599):
            proof = prove_inclusion(index, 600, LeafHashes(leaves))
            metamorphic_log.checkpoint_verify_inclusion(note, [vkey], index, leaves[index], proof)
            with pytest.raises(metamorphic_log.VerifyError):
                metamorphic_log.checkpoint_verify_inclusion(note, [vkey], index, leaves[index - 1], proof)

    def test_the_independent_verifier_refuses_a_changed_tile(self, folder, tmp_path, checker):
        with Trail.open(folder) as trail:
            grow(trail, 300)
            publish_tiles(folder, tmp_path / "www")
        for name, whole in contents(tmp_path / "www" / "tile").items():
            path = tmp_path / "www" / "tile" / name
            path.unlink()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert check(checker, tmp_path / "www", trail.log_vkey).returncode == 1
            path.write_bytes(whole)
        assert check(checker, tmp_path / "www", trail.log_vkey).returncode == 0

    def test_after_rotations_the_newest_key_stands_for_all(self, folder, tmp_path, checker):
        with Trail.open(folder) as trail:
            grow(trail, 250)
            publish_tiles(folder, tmp_path / "www")
            old = trail.log_vkey
            rotate_key(trail, "log")
            publish_tiles(folder, tmp_path / "both")
            for vkey in (old, trail.log_vkey):  # the checkpoint that holds the rotation is signed by both
                accepted(checker, tmp_path / "both", vkey)
            grow(trail, 600)
            publish_tiles(folder, tmp_path / "www")
            accepted(checker, tmp_path / "www", trail.log_vkey)
            assert check(checker, tmp_path / "www", old).returncode == 1

    @pytest.mark.parametrize("stop", [1, 3, 5, 7])
    def test_a_publish_that_was_cut_off_is_completed_by_a_larger_trail(
        self, folder, tmp_path, checker, monkeypatch, stop
    ):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 250)
            publish_tiles(folder, target)
            grow(trail, 520)
            moved = []

            def cut_off(*args, real=os.rename, **options):
                moved.append(args)
                if len(moved) == stop:
                    raise KeyboardInterrupt
                real(*args, **options)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(os, "rename", cut_off)
                publish_tiles(folder, target)
            assert "250 entries" in accepted(checker, target, trail.log_vkey)
            grow(trail, 800)
            publish_tiles(folder, target)
            assert "800 entries" in accepted(checker, target, trail.log_vkey)
            assert verify_published(target).reasons == ()
            publish_tiles(folder, tmp_path / "undisturbed")
        # Partial tiles that no checkpoint asked for stay until the full ones are there, as those do that one asked for.
        left = set(contents(target)) - set(contents(tmp_path / "undisturbed"))
        assert all(re.search(r"\.p/", name) for name in left)
        assert not (target / ".publishing").exists()


class TestAgain:
    def test_publishing_again_adds_what_is_new_and_continues_the_older_checkpoint(self, folder, tmp_path, checker):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 300)
            publish_tiles(folder, target)
            older = tmp_path / "older"
            shutil.copy(target / "checkpoint", older)
            before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
            again = publish_tiles(folder, target)
            assert (again.written, again.removed, again.before, again.size) == (0, 0, 300, 300)
            assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
            grow(trail, 700)
            done = publish_tiles(folder, target)
            assert (done.before, done.size, done.removed) == (300, 700, 2)
            accepted(checker, target, trail.log_vkey, "--from-note", older)

    def test_partial_tiles_stay_until_the_full_one_is_published(self, folder, tmp_path):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            for size in (10, 20, 255):
                grow(trail, size)
                publish_tiles(folder, target)
            assert sorted(path.name for path in (target / "tile/0/000.p").iterdir()) == ["10", "20", "255"]
            grow(trail, 256)
            assert publish_tiles(folder, target).removed == 6
        assert sorted(name for name in contents(target) if name != "checkpoint") == [
            "tile/0/000",
            "tile/1/000.p/1",
            "tile/entries/000",
        ]

    def test_what_a_publish_that_was_cut_off_would_have_dropped_the_next_one_drops(self, folder, tmp_path, monkeypatch):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 250)
            publish_tiles(folder, target)
            grow(trail, 300)

            def cut_off(name, **options):
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(os, "unlink", cut_off)
                publish_tiles(folder, target)
            assert (target / "tile/0/000.p/250").exists()
            assert verify_published(target).reasons == ()
            again = publish_tiles(folder, target)
            assert (again.before, again.written, again.removed) == (300, 0, 2)
        assert not (target / "tile/0/000.p").exists()

    def test_it_costs_what_is_new_and_not_the_trail(self, folder, monkeypatch):
        store = fsspec.filesystem("memory")
        with Trail.open(folder) as trail:
            fill(trail, 10_000)
            publish_tiles(folder, "memory://cost/t")
            fill(trail, 10_010)
        asked, hashed = [], []
        for name in ("cat_file", "pipe_file", "find"):
            real = getattr(store, name)
            monkeypatch.setattr(store, name, lambda *a, real=real, **o: (asked.append(a[0]), real(*a, **o))[1])
        real_hash = tiles.leaf_hash
        monkeypatch.setattr(tiles, "leaf_hash", lambda entry: (hashed.append(1), real_hash(entry))[1])
        done = publish_tiles(folder, "memory://cost/t")
        assert (done.before, done.size, done.written) == (10_000, 10_010, 3)
        assert len(asked) <= 12, asked
        assert len(hashed) <= 2 * 256
        store.store.clear()

    def test_what_is_missing_is_added_where_every_file_is_looked_at(self, folder, tmp_path):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 600)
        publish_tiles(folder, target)
        whole = contents(target)
        for name in ("tile/0/001", "tile/entries/000", "tile/1/000.p/2", "tile/0/002.p/88"):
            (target / name).unlink()
        assert publish_tiles(folder, target).written == 0
        assert publish_tiles(folder, target, everything=True).written == 4
        assert contents(target) == whole
        (target / "tile/0/001").unlink()
        (target / "tile/0/001").write_bytes(bytes(8192))
        with pytest.raises(StoreError) as caught:
            publish_tiles(folder, target, everything=True)
        assert (caught.value.reason, "tile/0/001" in caught.value.message) == ("diverged", True)

    def test_progress_is_told(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 300)
        told = []
        publish_tiles(folder, tmp_path / "www", progress=lambda *said: told.append(said))
        assert told == [(what, done, 300) for what in ("checked", "written") for done in (256, 300)]

    def test_a_trail_that_grows_meanwhile_is_published_as_it_was(self, folder, tmp_path, checker):
        with Trail.open(folder) as trail:
            grow(trail, 300)

            def more(what, done, size):
                if trail.reader().size < 310:
                    grow(trail, trail.reader().size + 5)

            assert publish_tiles(folder, tmp_path / "www", progress=more).size == 300
            assert "300 entries" in accepted(checker, tmp_path / "www", trail.log_vkey)
            assert publish_tiles(folder, tmp_path / "www").size > 300
            accepted(checker, tmp_path / "www", trail.log_vkey)

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12)), min_size=1, max_size=6))
    def test_however_it_grows_and_wherever_it_is_cut_off_the_files_verify(self, steps):
        """Each step: so many entries more, then a publish that is cut off before its n-th file (0: it is not)."""
        with tempfile.TemporaryDirectory() as name, Trail.open(Path(name) / "audit", home=Path(name) / "home") as trail:
            target, shown = Path(name) / "www", 0
            for more, stop in [*steps, (1, 0)]:
                fill(trail, trail.reader().size + more)
                moved = []

                def cut_off(*args, real=os.rename, moved=moved, stop=stop, **options):
                    moved.append(args)
                    if len(moved) == stop:
                        raise KeyboardInterrupt
                    real(*args, **options)

                with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                    patch.setattr(os, "rename", cut_off)
                    shown = publish_tiles(Path(name) / "audit", target).size
                if shown:
                    verdict = verify_published(target, home=Path(name) / "home")
                    assert (verdict.level, verdict.size, verdict.reasons) == (Level.UNANCHORED, shown, ())
            publish_tiles(Path(name) / "audit", Path(name) / "undisturbed")
            left = {path for path in contents(target) if ".p/" not in path}
            assert {path for path in contents(Path(name) / "undisturbed") if ".p/" not in path} == left


class TestRefused:
    def test_a_folder_of_another_history_is_refused_and_left_as_it_is(self, folder, tmp_path):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 300)
            publish_tiles(folder, target)
        before = contents(target)
        for name, size in (("other", 400), ("short", 20)):
            with Trail.open(tmp_path / name) as other:
                grow(other, size)
            with pytest.raises(StoreError, match="is of ") as caught:
                publish_tiles(tmp_path / name, target)
            assert caught.value.reason == "diverged"
        assert contents(target) == before

    @pytest.mark.parametrize("at", [256, 300])
    def test_a_rewritten_history_of_the_same_trail_is_refused(self, folder, tmp_path, at):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            grow(trail, 200)
        shutil.copytree(folder, tmp_path / "fork")
        shutil.copytree(os.environ["RLHF_AUDIT_HOME"], tmp_path / "fork-home")
        with Trail.open(folder) as trail:
            grow(trail, at)
        publish_tiles(folder, target)
        before = contents(target)
        with Trail.open(tmp_path / "fork", home=tmp_path / "fork-home") as fork:
            fork.append("a.b", b'{"another":"history"}')
            grow(fork, 600)
        for everything in (False, True):
            with pytest.raises(StoreError, match=f"root at size {at} is not this trail's") as caught:
                publish_tiles(tmp_path / "fork", target, everything=everything)
            assert caught.value.reason == "diverged"
        assert contents(target) == before

    def test_a_trail_that_went_back_is_refused(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 100)
        shutil.copytree(folder, tmp_path / "old")
        with Trail.open(folder) as trail:
            grow(trail, 300)
        publish_tiles(folder, tmp_path / "www")
        with pytest.raises(StoreError, match="it has 300 entries and the trail 100") as caught:
            publish_tiles(tmp_path / "old", tmp_path / "www")
        assert caught.value.reason == "diverged"

    def test_what_was_put_ahead_by_another_history_is_not_overwritten(self, folder, tmp_path):
        (tmp_path / "www/tile/0").mkdir(parents=True)
        (tmp_path / "www/tile/0/000").write_bytes(bytes(8192))
        with Trail.open(folder) as trail:
            grow(trail, 300)
        with pytest.raises(StoreError, match="tile/0/000") as caught:
            publish_tiles(folder, tmp_path / "www")
        assert caught.value.reason == "diverged"
        assert (tmp_path / "www/tile/0/000").read_bytes() == bytes(8192)
        assert not (tmp_path / "www/checkpoint").exists()

    def test_a_checkpoint_that_is_none_is_refused(self, folder, tmp_path):
        (tmp_path / "www").mkdir()
        (tmp_path / "www/checkpoint").write_text("hello\n")
        with Trail.open(folder) as trail:
            grow(trail, 3)
        with pytest.raises(StoreError, match="its checkpoint cannot be read") as caught:
            publish_tiles(folder, tmp_path / "www")
        assert caught.value.reason == "diverged"
        assert (tmp_path / "www/checkpoint").read_text() == "hello\n"

    @pytest.mark.parametrize(
        "damage",
        [
            """UPDATE bundles SET data = CAST(replace(data, '"n":', '"m":') AS BLOB)""",
            "UPDATE bundles SET data = substr(data, 1, length(data) - 1) WHERE first > 300",
            "DELETE FROM bundles WHERE first = (SELECT max(first) FROM bundles)",
            "UPDATE nodes SET hash = zeroblob(32) WHERE number = 0",
            "DELETE FROM nodes",
            "UPDATE head SET note = 'nothing'",
        ],
    )
    @pytest.mark.parametrize("before", [0, 300])
    def test_a_damaged_trail_is_not_published(self, folder, tmp_path, damage, before):
        target = tmp_path / "www"
        with Trail.open(folder) as trail:
            if before:
                grow(trail, before)
                publish_tiles(folder, target)
            grow(trail, 600)
        connection = sqlite3.connect(folder / "trail.sqlite")
        with connection:
            connection.execute(damage)
        connection.close()
        published = contents(target)
        if not before and "nodes" in damage:  # a first publish needs nothing but the entries
            assert publish_tiles(folder, target).size == 600
            return
        with pytest.raises(StoreError) as caught:
            publish_tiles(folder, target)
        assert caught.value.reason == "damaged"
        assert contents(target) == published

    def test_a_link_among_the_tiles_is_refused(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 20)
        target = tmp_path / "www"
        (target / "tile/0").mkdir(parents=True)
        (target / "tile/0/000.p").mkdir()
        (target / "tile/0/000.p/20").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError) as caught:
            publish_tiles(folder, target)
        assert caught.value.reason == "link"
        assert TrailReader.open(folder).size == 20

    def test_somebody_else_who_publishes_meanwhile_is_noticed(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 20)
            publish_tiles(folder, "memory://meanwhile/t")
            grow(trail, 30)
        shutil.copytree(folder, tmp_path / "copy")

        def other(what, done, size):
            if what == "written":
                publish_tiles(tmp_path / "copy", "memory://meanwhile/t")

        with pytest.raises(StoreError) as caught:
            publish_tiles(folder, "memory://meanwhile/t", progress=other)
        assert caught.value.reason == "in-use"
        assert verify_published("memory://meanwhile/t").size == 30
        fsspec.filesystem("memory").store.clear()

    def test_the_folder_of_a_trail_is_no_place_to_publish_to(self, folder, tmp_path):
        for place in (folder, tmp_path / "other"):
            with Trail.open(place) as trail:
                grow(trail, 3)
        for place in (folder, str(tmp_path / "other")):
            before = sorted(path.name for path in Path(place).iterdir())
            with pytest.raises(StoreError, match="folder of a trail itself") as caught:
                publish_tiles(folder, place)
            assert caught.value.reason == "target"
            assert sorted(path.name for path in Path(place).iterdir()) == before

    def test_no_trail_is_one_clear_sentence_and_makes_no_folder(self, tmp_path):
        with pytest.raises(StoreError, match="no trail at"):
            publish_tiles(tmp_path / "nowhere", tmp_path / "www")
        assert not (tmp_path / "www").exists()


class TestCheckpoint:
    def test_a_second_signature_is_added_once(self, folder, tmp_path, checker):
        with Trail.open(folder) as trail:
            grow(trail, 5)
            rotate_key(trail, "mldsa")
            for written in (5, 0):
                done = publish_tiles(folder, tmp_path / "www", endorse=trail.keys.endorse)
                assert done.written == (3 if written else 0)
            lines = parse_note((tmp_path / "www/checkpoint").read_bytes()).signatures
            assert [line.name for line in lines] == [trail.origin] * 2
            verdict = verify_published(tmp_path / "www")
            assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())
            assert trail.keys.mldsa_vkey in verdict.signers
            accepted(checker, tmp_path / "www", trail.log_vkey)
            assert publish_tiles(folder, tmp_path / "www").written == 0

    def test_a_file_of_anchors_that_is_damaged_keeps_nothing_from_being_published(self, folder, tmp_path):
        with Trail.open(folder) as trail:
            grow(trail, 5)
            AnchorFolder(folder).keep(trail.reader().checkpoint())
        for name in ("5.checkpoint", "5.cosigned", "5.local.tsr", "notes.txt"):
            (folder / "anchors" / name).write_bytes(b"nothing")
        publish_tiles(folder, tmp_path / "www")
        assert (tmp_path / "www/checkpoint").read_text() == TrailReader.open(folder).checkpoint()
        verdict = verify_published(tmp_path / "www")
        assert verdict.level is Level.UNANCHORED
        assert {reason.code for reason in verdict.reasons} == {"anchor"}
