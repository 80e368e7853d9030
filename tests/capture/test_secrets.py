"""What is taken out of a text, and what is not: each kind of credential, and the things that look like one."""

from __future__ import annotations

import base64
import hashlib
from urllib.parse import quote

import pytest

from rlhf_audit_nb.capture.secrets import PATTERNS, Scrubber, find_secret, scrub, scrub_values
from rlhf_audit_nb.events import RunFinished, RunStarted, Step

PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBm0\n-----END EC PRIVATE KEY-----"
SECRETS = {
    "Hugging Face": "hf_" + "aBcD1" * 7,
    "OpenAI": "sk-proj-" + "a1B2" * 10,
    "Stripe": "sk_live_" + "4eC39HqLyj",
    "GitHub": "ghp_" + "x9Y8" * 9,
    "GitHub, fine-grained": "github_pat_" + "11ABCDEFG0" * 4,
    "GitLab": "glpat-" + "abcde12345" * 2,
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "Google": "AIza" + "SyA1b2C" * 5,
    "Slack": "xoxb-" + "123456789012-abcdef",
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" * 5,
    "npm": "npm_" + "a1b2c3" * 6,
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlMTIz",
    "private key": PEM,
}
INNOCENT = (
    hashlib.sha256(b"weights").hexdigest(),
    f"sha256 {hashlib.sha256(b'data').hexdigest()}; columns prompt, chosen",
    f"commit={hashlib.sha1(b'c', usedforsecurity=False).hexdigest()}",
    base64.b64encode(hashlib.sha512(b"root").digest()).decode(),
    "pad_token=<pad>, eos_token: </s>",
    "max_completion_tokens=1024, tokens 5",
    "the budget's key = 'annotator_id'",
    "KeyError: 'chosen'",
    "sk-learn-is-a-library-of-many-tools",
    "git@github.com:someone/project.git",
    "https://example.com/a?b=c#d",
    "rewards/chosen",
    "example/tiny-policy",
)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_credential_of_a_known_shape_is_taken_out_of_any_text(kind):
    secret = SECRETS[kind]
    assert find_secret(secret) is not None
    for text in (
        secret,
        f"name-{secret}",
        f"name_{secret}",
        f"could not log in with {secret}.",
        f'{{"a": "{secret}"}}',
        f"x({secret!r})",
    ):
        assert secret not in scrub(text)
        assert "[removed: " in scrub(text)


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_one_stays(text):
    assert scrub(text) is text
    assert find_secret(text) is None


def test_every_pattern_is_tried_by_a_text_that_holds_one_of_its_hints():
    told = [
        *SECRETS.values(),
        "https://me:pw@example.com",
        "db://me:pw@host/x",
        "password=hunter2",
        "token=" + "a1" * 9,
        "Bearer " + "a1" * 9,
        "r8_" + "a1" * 20,
        "https://hooks.slack.com/services/T00/B00/" + "a1" * 9,
        "SG." + "a1" * 10 + "." + "a1" * 20,
    ]
    assert [pattern.what for pattern in PATTERNS if not any(pattern.rule.search(text) for text in told)] == []
    for pattern in PATTERNS:
        for text in told:
            if pattern.rule.search(text):
                assert any(hint in text.lower() for hint in pattern.hints), pattern


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("git clone https://me:pa55@example.com/x.git", "git clone https://{}@example.com/x.git"),
        ("https://0123456789abcdef@example.com/x", "https://{}@example.com/x"),
        ("postgresql+psycopg://audit:pw@db.example.com/trail", "postgresql+psycopg://{}@db.example.com/trail"),
    ],
)
def test_of_an_address_only_user_and_password_go(text, kept):
    assert scrub(text) == kept.format("[removed: user and password of an address]")


def test_a_value_that_is_called_a_secret_goes_whatever_its_shape():
    assert "hunter2" not in scrub("--password=hunter2 --steps=3")
    assert "--steps=3" in scrub("--password=hunter2 --steps=3")
    assert "two words" not in scrub("passphrase: 'two words'")
    settings = {"wandb_api_key": "a" * 40, "hub_token": "abcdefgh", "eos_token": "<|endoftext|>", "lr": 0.1, "n": ["x"]}
    scrubbed = scrub_values(settings)
    assert scrubbed["wandb_api_key"] == scrubbed["hub_token"] == "[removed: value that is called a secret]"
    assert {name: scrubbed[name] for name in ("eos_token", "lr", "n")} == {
        "eos_token": "<|endoftext|>",
        "lr": 0.1,
        "n": ["x"],
    }


@pytest.mark.parametrize("write", [str, lambda v: quote(v, safe=""), lambda v: base64.b64encode(v.encode()).decode()])
def test_the_value_of_a_variable_that_is_named_a_secret_goes_wherever_it_stands(monkeypatch, write):
    value = "correct horse/battery staple"
    text = f"connected as {write(value)} to the store"
    assert scrub(text) is text
    monkeypatch.setenv("STORE_PASSWORD", value)
    assert scrub(text) == "connected as [removed: value of the variable STORE_PASSWORD] to the store"
    assert value not in repr(scrub_values({"notes": [write(value)], write(value): 1}))


def test_variables_of_other_names_and_short_values_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long-enough")
    monkeypatch.setenv("A_TOKEN", "short")
    assert scrub("false-and-long-enough and short") == "false-and-long-enough and short"


def test_a_scrubber_reads_the_environment_when_it_is_told_to(monkeypatch):
    scrubber = Scrubber()
    assert scrubber.text("made-up-value-1") == "made-up-value-1"
    monkeypatch.setenv("SERVICE_KEY", "made-up-value-1")
    assert scrubber.text("made-up-value-1") == "made-up-value-1"
    scrubber.refresh()
    assert scrubber.text("made-up-value-1") == "[removed: value of the variable SERVICE_KEY]"


def test_an_event_is_scrubbed_in_every_text_and_is_itself_where_there_is_nothing():
    clean = RunStarted(experiment="e", entry_point="cell", tool="t", privacy={"epsilon": 8.0}, cell_digest="0" * 64)
    assert Scrubber().event(clean) is clean
    secret = SECRETS["GitHub"]
    planted = RunStarted(
        experiment=secret, entry_point="cell", tool="t", privacy={secret: [secret]}, cell_digest="0" * 64
    )
    scrubbed = Scrubber().event(planted)
    assert secret not in repr(scrubbed)
    assert scrubbed.cell_digest == planted.cell_digest
    step = Step(step=1, metrics={"loss": 0.5, secret: 1.0}, notes=[secret])
    assert secret not in repr(Scrubber().event(step))
    assert Scrubber().event(step).metrics["loss"] == 0.5


def test_scrubbing_twice_is_scrubbing_once():
    for secret in (*SECRETS.values(), "password=hunter2", "https://me:pw@example.com"):
        assert scrub(scrub(secret)) == scrub(secret)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROMPT_KEY", "question"),
        ("REWARD_KEYS", "rewards/chosen"),
        ("TEXT_KEY", "prompt_text"),
        ("PAD_TOKEN", "<|endoftext|>"),
        ("EOS_TOKEN", "endoftext"),
        ("STOP_TOKEN", "[STOPHERE]"),
        ("MAX_TOKENS", "10000000"),
    ],
)
def test_a_setting_that_only_sounds_like_a_secret_leaves_texts_as_they_are(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = f"columns: {value}, answer"
    assert scrub(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVICE_API_KEY", "correcthorse"),
        ("STORE_PASSWORD", "question"),
        ("APP_SECRET", "rewards/chosen"),
        ("JUPYTER_TOKEN", "correcthorse"),
        ("JUPYTER_TOKEN", "10000000"),
        ("SOME_KEY", "abcdefghijklmnopqrstuv"),
        ("SOME_KEY", "0123456789abcdef"),
        ("PAT", "question"),
    ],
)
def test_what_may_be_a_secret_is_taken_out_also_where_it_is_a_word(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert value not in scrub(f"it says {value} here")


def test_the_words_of_this_package_are_nobodys_password(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "completed")
    event = RunFinished(status="completed", steps=1, trained=True, reason="completed")
    assert Scrubber().event(event).status == "completed"
    assert "completed" not in Scrubber().event(event).reason.replace("[removed", "")
