"""Published tiles, checked by a verifier that shares no code with the package."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import Trail, TrailReader
from rlhf_audit_nb.trail.tiles import publish_tiles, tile_path

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


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")
        if number % 97 == 0:
            trail.flush()
    trail.flush()


@pytest.mark.parametrize(
    ("number", "width", "path"),
    [
        (0, 256, "tile/0/000"),
        (273, 112, "tile/0/273.p/112"),
        (1234067, 256, "tile/0/x001/x234/067"),
        (1000, 1, "tile/0/x001/000.p/1"),
    ],
)
def test_tiles_are_named_as_the_specification_says(number, width, path):
    assert tile_path(0, number, width) == path


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_an_independent_verifier_accepts_what_is_published(folder, tmp_path, checker, size):
    with Trail.open(folder) as trail:
        grow(trail, size)
        published = publish_tiles(folder, tmp_path / "www")
        assert published.size == size
        done = check(checker, tmp_path / "www", trail.log_vkey)
        assert done.returncode == 0, done.stderr
        assert f"{size} entries" in done.stdout


def test_a_long_trail_reaches_the_second_level(folder, tmp_path, checker):
    with Trail.open(folder) as trail:
        for number in range(256 * 256 + 300):
            trail.append("a.b", b'{"n":%d}' % number)
        trail.flush()
        publish_tiles(folder, tmp_path / "www")
        done = check(checker, tmp_path / "www", trail.log_vkey)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "www/tile/1/000").stat().st_size == 8192
    assert (tmp_path / "www/tile/2/000.p/1").stat().st_size == 32


def test_publishing_again_adds_what_is_new_and_continues_the_older_checkpoint(folder, tmp_path, checker):
    target = tmp_path / "www"
    with Trail.open(folder) as trail:
        grow(trail, 300)
        publish_tiles(folder, target)
        older = tmp_path / "older"
        shutil.copy(target / "checkpoint", older)
        assert publish_tiles(folder, target).written == 0
        grow(trail, 700)
        publish_tiles(folder, target)
        done = check(checker, target, trail.log_vkey, "--from-note", older)
    assert done.returncode == 0, done.stderr


def test_the_independent_verifier_refuses_a_changed_tile(folder, tmp_path, checker):
    with Trail.open(folder) as trail:
        grow(trail, 300)
        publish_tiles(folder, tmp_path / "www")
    for path in (tmp_path / "www" / "tile").rglob("*"):
        if path.is_file():
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert check(checker, tmp_path / "www", trail.log_vkey).returncode == 1
            path.write_bytes(whole)
    assert check(checker, tmp_path / "www", trail.log_vkey).returncode == 0


def test_a_folder_of_another_history_is_refused_and_left_as_it_is(folder, tmp_path):
    target = tmp_path / "www"
    with Trail.open(folder) as trail:
        grow(trail, 300)
        publish_tiles(folder, target)
    before = (target / "checkpoint").read_bytes()
    with Trail.open(tmp_path / "other") as other:
        grow(other, 400)
        with pytest.raises(StoreError) as caught:
            publish_tiles(tmp_path / "other", target)
        assert caught.value.reason == "diverged"
    with Trail.open(tmp_path / "short") as short:
        grow(short, 20)
        with pytest.raises(StoreError) as caught:
            publish_tiles(tmp_path / "short", target)
        assert caught.value.reason == "diverged"
    assert (target / "checkpoint").read_bytes() == before


def test_a_damaged_trail_is_not_published(folder, tmp_path):
    with Trail.open(folder) as trail:
        grow(trail, 20)
    connection = sqlite3.connect(folder / "trail.sqlite")
    with connection:
        connection.execute("""UPDATE bundles SET data = CAST(replace(data, '"n":', '"m":') AS BLOB)""")
    connection.close()
    with pytest.raises(StoreError) as caught:
        publish_tiles(folder, tmp_path / "www")
    assert caught.value.reason == "damaged"
    assert list((tmp_path / "www").iterdir()) == []


def test_a_link_among_the_tiles_is_refused(folder, tmp_path):
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
