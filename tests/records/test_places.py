"""Notebooks and records lie wherever papermill has a handler for; nothing unsealed is ever left at an address."""

from __future__ import annotations

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import papermill
import pytest
from papermill.iorw import papermill_io
from records_support import write_notebook

from rlhf_audit_nb.cli import main
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records import open_record, read_record, run_notebook
from rlhf_audit_nb.records.places import base_name, check_output, read_place, shown, write_place
from rlhf_audit_nb.records.run import NotebookFailedError


class Memory:
    """A store of objects behind papermill's own registry: what lies at each address, and every write to it."""

    def __init__(self):
        self.objects: dict[str, str] = {}
        self.writes: list[str] = []
        self.refuses: Exception | None = None
        self.listing: Exception | None = None

    def read(self, path):
        return self.objects[path].encode()

    def write(self, text, path):
        if self.refuses is not None:
            raise self.refuses
        self.objects[path] = text
        self.writes.append(path)

    def listdir(self, path):
        if self.listing is not None:
            raise self.listing
        return [found for found in self.objects if found.startswith(path)]

    def pretty_path(self, path):
        return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(monkeypatch):
    handler = Memory()
    monkeypatch.setattr(papermill_io, "_handlers", [("mem://", handler), *papermill_io._handlers])
    return handler


def source(store, cells=("print('é😀')",)):
    cells = [nbformat.v4.new_code_cell(cell, id=f"cell-{i}") for i, cell in enumerate(cells)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    node = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    store.objects["mem://bucket/in.ipynb?token=secret"] = nbformat.writes(node)
    return "mem://bucket/in.ipynb?token=secret"


@pytest.mark.slow
def test_the_command_runs_from_an_address_to_an_address_and_verifies_what_lies_there(folder, store, capsys):
    given = source(store)
    assert main(["run", given, "-o", "mem://bucket/out.ipynb", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["record"], answer["verdict"]["level"]) == ("mem://bucket/out.ipynb", "UNANCHORED")
    assert store.writes == ["mem://bucket/out.ipynb"]
    text = store.objects["mem://bucket/out.ipynb"]
    assert text.isascii()
    assert "secret" not in text
    assert json.loads(text)["metadata"]["papermill"]["input_path"] == "in.ipynb"
    assert json.loads(text)["cells"][0]["outputs"][0]["text"] == ["é😀\n"]
    assert main(["verify", "mem://bucket/out.ipynb"]) == 0
    store.objects["mem://bucket/out.ipynb"] = text.replace("print", "prinT")
    assert main(["verify", "mem://bucket/out.ipynb"]) == 40


@pytest.mark.slow
def test_a_failed_run_is_one_write_and_papermills_own_are_sealed(folder, store):
    given = source(store, ["1", "1 / 0"])
    with pytest.raises(NotebookFailedError, match=r"record mem://bucket/out\.ipynb is sealed with status 'failed'"):
        run_notebook(given, "mem://bucket/out.ipynb")
    assert store.writes == ["mem://bucket/out.ipynb"]
    assert open_record("mem://bucket/out.ipynb").sealed.status == "failed"
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(given, "mem://bucket/pm.ipynb", engine_name="audit", progress_bar=False)
    assert open_record("mem://bucket/pm.ipynb").verdict.reasons == ()
    # The engine's sealed record, and papermill's with its markers; nothing before either.
    assert store.writes[1:] == ["mem://bucket/pm.ipynb"] * 2


@pytest.mark.slow
def test_a_store_that_fails_in_the_end_loses_no_record(folder, store):
    store.refuses = RuntimeError("mem://bucket/out.ipynb?token=secret is read-only: token=secret")
    with pytest.raises(RecordError, match=r"cannot be written: .* is read-only.*; it is sealed, and lies at") as caught:
        run_notebook(source(store), "mem://bucket/out.ipynb?token=secret")
    assert "secret" not in caught.value.message
    kept = caught.value.message.rpartition(" lies at ")[2].rstrip(".")
    assert open_record(kept).verdict.reasons == ()


@pytest.mark.slow
def test_standard_input_and_output_hold_notebooks_and_nothing_else(folder, store, monkeypatch, capsysbinary):
    text = store.objects[source(store)]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["run", "-", "-o", "-"]) == 0
    said = capsysbinary.readouterr()
    assert read_record(said.out).verdict.reasons == ()
    assert b"standard" in said.err
    assert main(["run", "-", "-o", "-", "--json"]) == 2
    assert main(["run", "-"]) == 2
    assert b"it is not known where the record should go" in capsysbinary.readouterr().err


MISSING = {
    "s3": ("S3", "s3", "boto3"),
    "gs": ("GCSFileSystem", "gcs", "gcsfs"),
    "abs": ("AzureBlobStore", "azure", "azure.storage.blob"),
    "adl": ("ADL", "azure", "azure.datalake.store"),
}


@pytest.mark.parametrize("scheme", MISSING)
def test_a_missing_extra_is_named_with_what_installs_it(folder, scheme, monkeypatch, capsys):
    from papermill import iorw
    from papermill.exceptions import missing_dependency_generator

    # As papermill itself does where the package is not installed, whether or not it is here.
    name, extra, package = MISSING[scheme]
    monkeypatch.setattr(iorw, name, missing_dependency_generator(package, extra))
    write_notebook(folder / "in.ipynb", [f"open({str(folder / 'ran')!r}, 'w')"])
    for asked in (
        ["run", f"{scheme}://b/in.ipynb", "-o", "o.ipynb"],
        ["run", "in.ipynb", "-o", f"{scheme}://b/o.ipynb"],
    ):
        assert main(asked) == 2
        said = capsys.readouterr().err
        assert f"{package} is not installed" in said
        assert f'pip install "papermill[{extra}]"' in said
    assert main(["verify", f"{scheme}://b/o.ipynb"]) == 2
    assert f'pip install "papermill[{extra}]"' in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["in.ipynb"]


class Fatal(Exception):
    """What boto3 raises for a bucket that is not there."""

    def __init__(self, message):
        super().__init__(message)
        self.response = {"Error": {"Code": "NoSuchBucket"}}


def test_what_can_be_known_of_an_address_is_said_before_anything_runs(folder, store):
    store.listing = Fatal("The specified bucket does not exist")
    with pytest.raises(RecordError, match=r"mem://b/o\.ipynb cannot be written: The specified bucket does not exist"):
        check_output("in.ipynb", "mem://b/o.ipynb")
    store.listing = PermissionError("may write, may not list")
    check_output("in.ipynb", "mem://b/o.ipynb")
    with pytest.raises(RecordError, match="papermill reads from GitHub and does not write there"):
        check_output("in.ipynb", "https://github.com/o/r/blob/main/o.ipynb")
    with pytest.raises(RecordError, match="would overwrite the notebook"):
        check_output("mem://b/o.ipynb", "mem://b/o.ipynb")
    with pytest.raises(RecordError, match=r"would not end in \.ipynb"):
        check_output("in.ipynb", "mem://b/o.txt")
    with pytest.raises(RecordError, match="papermill has no handler for"):
        check_output("in.ipynb", "ftp://b/o.ipynb")
    with pytest.raises(RecordError, match="papermill has no handler for"):
        read_place("ftp://b/o.ipynb")


def test_what_is_shown_of_an_address_has_no_secret_in_it():
    address = "abs://user:pass@account.blob.core.windows.net/c/n.ipynb?sig=secret#part"
    assert shown(address) == "abs://account.blob.core.windows.net/c/n.ipynb"
    assert (base_name(address), base_name("a/b.ipynb"), base_name("-")) == ("n.ipynb", "b.ipynb", "-")


# -- papermill's own handler for the web, against a server on loopback ------------------------------------------------


@pytest.fixture
def web():
    """A server that keeps what it is sent, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b""):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            body = files.get(self.path)
            self.answer(404 if body is None else 200, b"<html>no such page</html>" if body is None else body)

        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/locked"):
                self.answer(403)
                return
            files[self.path] = body
            self.answer(200)

        def log_message(self, *_):
            pass

    files: dict[str, bytes] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", files
        server.shutdown()
        thread.join(timeout=10)


@pytest.mark.slow
def test_a_notebook_from_the_web_and_a_record_put_there_verify(folder, store, web):
    address, files = web
    files["/in.ipynb"] = store.objects[source(store)].encode()
    result = run_notebook(f"{address}/in.ipynb", f"{address}/out.ipynb")
    assert result.path == f"{address}/out.ipynb"
    assert open_record(f"{address}/out.ipynb").verdict.reasons == ()
    assert main(["verify", f"{address}/out.ipynb"]) == 0


def test_a_page_of_the_server_is_not_taken_for_the_notebook(folder, web, capsys):
    address, _ = web
    assert main(["run", f"{address}/gone.ipynb", "-o", "o.ipynb"]) == 2
    assert "404" in capsys.readouterr().err
    with pytest.raises(RecordError, match="403"):
        write_place(f"{address}/locked/o.ipynb", "{}")


def test_text_that_begins_with_a_dash_is_a_file_and_not_a_stream(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    write_place("-x.ipynb", "{}")
    assert read_place("-x.ipynb") == b"{}"
