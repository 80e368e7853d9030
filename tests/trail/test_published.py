"""Verifying a published trail from its files alone."""

from __future__ import annotations

import random
import shutil

import pytest

from rlhf_audit_nb.errors import KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.published import is_published, verify_published
from rlhf_audit_nb.trail.tiles import publish_tiles


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")
        if number % 97 == 0:
            trail.flush()
    trail.flush()


@pytest.fixture
def published(folder, tmp_path):
    """A trail of 600 entries and where it was published: two full tiles, a partial one, and a tile above them."""
    with Trail.open(folder) as trail:
        grow(trail, 600)
        publish_tiles(folder, tmp_path / "www")
    return tmp_path / "www"


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
    assert not is_published(folder)
    assert not is_published(tmp_path / "nowhere")


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


def test_a_flip_in_any_file_is_found_and_its_file_or_entry_named(published):
    drawn = random.Random(5)
    for path in sorted(path for path in published.rglob("*") if path.is_file()):
        name, whole = path.relative_to(published).as_posix(), path.read_bytes()
        for at in {0, len(whole) - 1, *(drawn.randrange(len(whole)) for _ in range(4))}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << drawn.randrange(8)]) + whole[at + 1 :])
            verdict = verify_published(published) if name != "checkpoint" else None
            if verdict is None:
                continue
            assert verdict.level is Level.INVALID, (name, at)
            number = int(name.rsplit("/", 1)[-1]) if ".p/" not in name else 2
            near = {name, f"tile/0/{number:03d}", f"tile/0/{number:03d}.p/88"}
            assert any(item.where in near or item.where.startswith("entry ") for item in verdict.reasons), (name, at)
        path.write_bytes(whole)
    assert verify_published(published).level is Level.UNANCHORED


def test_a_flip_in_the_checkpoint_never_passes(published):
    path = published / "checkpoint"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            level = verify_published(published).level
        except KeyFileError:  # another origin: the sentence names it, and nothing was said to hold
            continue
        assert level is Level.INVALID, at


@pytest.mark.parametrize("name", ["tile/0/001", "tile/1/000.p/2", "tile/entries/000", "tile/entries/002.p/88"])
def test_a_missing_a_cut_and_a_linked_file_are_named(published, tmp_path, name):
    path = published / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert name in [where for _, where in faults(published)]
    path.unlink()
    assert ("missing", name) in faults(published)
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")
    assert ("missing", name) in faults(published)


def test_a_tile_of_width_zero_is_named(published):
    stray = published / "tile/0/003.p/0"
    stray.parent.mkdir()
    stray.touch()
    assert faults(published) == [("tile", "tile/0/003.p/0")]


def test_an_older_copy_diverges_from_what_was_seen(folder, published, tmp_path):
    older = shutil.copytree(published, tmp_path / "older")
    with Trail.open(folder) as trail:
        grow(trail, 700)
    publish_tiles(folder, published)
    assert verify_published(published).level is Level.UNANCHORED
    verdict = verify_published(older)
    assert verdict.level is Level.DIVERGED
    assert [reason.code for reason in verdict.reasons] == ["rollback"]
    assert verify_published(older, home=None, policy=None).exit_code() == 30


def test_a_folder_without_a_checkpoint_is_one_clear_sentence(tmp_path):
    with pytest.raises(StoreError, match="no published trail"):
        verify_published(tmp_path)
