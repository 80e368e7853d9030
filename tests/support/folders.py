"""Saved folders, changed in each way that there is, and asked of OpenSSF's own implementation."""

from __future__ import annotations

KINDS = {"changed": "changed", "cut": "changed", "added": "added", "removed": "removed", "renamed": "renamed",
         "link": "link"}  # fmt: skip
"""The changes, and what each is called by our own check."""


def reference(folder):
    """Whether OpenSSF's own implementation accepts the folder (its command line: `test_weights`)."""
    from model_signing import verifying

    try:
        verifying.Config().use_elliptic_key_verifier(public_key=folder / "model.pub").verify(
            folder, folder / "model.sig"
        )
    except ValueError:
        return False
    return True


def change(folder, kind):
    """Make one change; what it should be called."""
    weights = folder / "model.safetensors"
    if kind == "changed":
        content = bytearray(weights.read_bytes())
        content[5000] ^= 1
        weights.write_bytes(content)
        return "model.safetensors", None
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
        return "model.safetensors", None
    if kind == "added":
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "extra.py").write_text("import os")
        return "sub/extra.py", None
    if kind == "removed":
        (folder / "config.json").unlink()
        return "config.json", None
    if kind == "renamed":
        weights.rename(folder / "other.safetensors")
        return "other.safetensors", "model.safetensors"
    (folder / "link.json").symlink_to(folder / "config.json")
    return "link.json", None
