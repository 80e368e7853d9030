"""A folder of weights against the trail: which entry it is, and every way in which it is not."""

from __future__ import annotations

import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.capture.folders import sign_folder
from rlhf_audit_nb.compliance.evidence import Evidence
from rlhf_audit_nb.compliance.weights import check_weights, saved_weights
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.reports.sources import evidence_of
from rlhf_audit_nb.trail import Level, Trail
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.tiles import publish_tiles

RUN = "a" * 32


def record_save(trail, folder, key, step, *, listed=True):
    signed = sign_folder(folder, key)
    event = ev.WeightsSaved(
        step=step,
        name=folder.name,
        digest=signed.digest,
        files=signed.files,
        bytes=signed.bytes,
        signature_digest=signed.signature_digest,
        listed=signed.listed if listed else None,
    )
    trail.append(event.TYPE, encode_body(event), run=RUN).wait()


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")
    with Trail.open(tmp_path / "audit") as trail:
        started = ev.RunStarted(experiment="first", entry_point="cell", tool="t")
        trail.append(started.TYPE, encode_body(started), run=RUN).wait()
        record_save(trail, folder, trail.keys.model, 5)
    return tmp_path


def check(place, folder="model"):
    return check_weights(place / folder, Evidence.from_trail(place / "audit"))


def codes(found):
    return [reason.code for reason in found.reasons]


def test_an_untouched_folder_is_its_entry(place):
    found = check(place)
    assert found.intact
    assert (found.saved.entry, found.saved.run, found.saved.step) == (2, RUN, 5)
    assert found.level is found.trail.level is Level.UNANCHORED
    assert found.exit_code() == 0
    assert found.exit_code(Level.COSIGNED) == 10
    assert "entry 2" in str(found)
    assert found.to_dict()["saved"]["experiment"] == "first"


def test_it_is_known_under_another_name(place):
    shutil.move(place / "model", place / "moved")
    assert check(place, "moved").intact


def test_a_changed_file_is_named_and_the_level_is_invalid(place):
    (place / "model" / "config.json").write_text("{ }")
    found = check(place)
    assert codes(found) == ["file-changed"]
    assert found.reasons[0].where == "config.json"
    assert found.saved.entry == 2
    assert found.level is Level.INVALID
    assert found.exit_code() == 40


def test_a_folder_signed_by_somebody_else_is_refused_whatever_key_lies_in_it(place):
    (place / "model" / "config.json").write_text('{"evil": 1}')
    sign_folder(place / "model", ec.generate_private_key(ec.SECP256R1()))
    found = check(place)
    assert codes(found) == ["model-signature"]
    assert "not of this trail's key" in found.reasons[0].message
    assert found.saved is None


def test_a_folder_signed_again_with_the_trails_key_and_not_recorded_is_refused(place):
    (place / "model" / "config.json").write_text("{ }")
    with Trail.open(place / "audit") as trail:
        sign_folder(place / "model", trail.keys.model)
    found = check(place)
    assert codes(found) == ["model-signature"]
    assert "no entry of the trail knows it" in found.reasons[0].message


def test_an_entry_for_a_signature_by_another_key_does_not_help(place):
    other = ec.generate_private_key(ec.SECP256R1())
    with Trail.open(place / "audit") as trail:
        record_save(trail, place / "model", other, 6)
    found = check(place)
    assert codes(found) == ["model-key"]


def test_without_its_signature_a_folder_is_known_by_its_digest(place):
    (place / "model" / "model.sig").unlink()
    found = check(place)
    assert found.intact
    assert found.saved.entry == 2
    assert "model.sig is gone" in found.notes[0]
    (place / "model" / "config.json").write_text("{ }")
    found = check(place)
    assert codes(found) == ["weights-unknown"]
    assert found.level is Level.INVALID


def test_without_its_signature_a_renamed_file_is_noticed_still(place):
    """Renamed so that the order of the files stays, the folder's digest stays too."""
    (place / "model" / "model.sig").unlink()
    (place / "model" / "config.json").rename(place / "model" / "configuration.json")
    found = check(place)
    assert codes(found) == ["file-renamed"]
    assert found.level is Level.INVALID


def test_where_an_entry_lists_no_names_it_is_said_that_they_are_not_shown(place):
    (place / "model" / "config.json").write_text("{  }")
    with Trail.open(place / "audit") as trail:
        record_save(trail, place / "model", trail.keys.model, 6, listed=False)
    (place / "model" / "model.sig").unlink()
    found = check(place)
    assert found.intact
    assert "whatever their names are" in found.notes[0]


def test_a_damaged_signature_is_said_to_be_one(place):
    (place / "model" / "model.sig").write_bytes(b"{")
    found = check(place)
    assert codes(found) == ["model-signature"]
    assert found.saved.entry == 2
    assert not found.intact


def test_a_key_that_was_rotated_counts_for_what_it_signed_before(place):
    with Trail.open(place / "audit") as trail:
        before = trail.keys.model.public_key()
        rotate_key(trail, "model")
    assert check(place).intact
    with Trail.open(place / "audit") as trail:
        assert trail.keys.model.public_key() != before
        (place / "model" / "config.json").write_text("{ }")
        record_save(trail, place / "model", trail.keys.model, 7)
    found = check(place)
    assert found.intact
    assert found.saved.step == 7


def test_a_trail_that_does_not_hold_shows_nothing_of_weights(place):
    import sqlite3

    with sqlite3.connect(place / "audit" / "trail.sqlite") as base:
        base.execute("UPDATE bundles SET data = zeroblob(length(data)) WHERE first = 0")
    found = check(place)
    assert found.level < Level.UNANCHORED
    assert not found.intact
    assert "the trail does not hold" in found.words


def test_a_published_trail_says_the_same(place, tmp_path):
    publish_tiles(place / "audit", tmp_path / "public")
    evidence = evidence_of(tmp_path / "public")
    assert check_weights(place / "model", evidence).intact
    assert [one.entry for one in saved_weights(evidence)] == [2]
    (place / "model" / "config.json").unlink()
    assert codes(check_weights(place / "model", evidence)) == ["file-removed"]


def test_checkpoints_below_are_told_to_be_no_part_of_it(place):
    (place / "model" / "checkpoint-1").mkdir()
    with Trail.open(place / "audit") as trail:
        record_save(trail, place / "model", trail.keys.model, 6)
    found = check(place)
    assert found.intact
    assert any("checkpoint-1" in note for note in found.notes)


@pytest.mark.parametrize("name", ["nowhere", "audit"])
def test_what_holds_no_weights_is_refused(place, name):
    with pytest.raises(ConfigError, match="not a folder with weights"):
        check_weights(place / name, Evidence.from_trail(place / "audit"))
