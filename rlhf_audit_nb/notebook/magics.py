"""``%%audit_train`` and ``%audit``. Floor 6.

The cell's body is run as IPython would run it (``!``, ``%`` and a last expression included), once, inside an open run;
an exception shows the user's own lines and leaves the cell with status *error*. Mistakes on the magic's line are
`ConfigError`s: one clear block, and nothing is opened. The line, not the body, may use ``$name`` and ``{expression}``
from the notebook, so that a parameters cell sets the options.

Importing this module loads no torch: that comes with the first audited cell.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import os
import re
import shlex
import warnings
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core import magic_arguments as _arguments
from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics,
    line_cell_magic,
    line_magic,
    magics_class,
    no_var_expand,
    output_can_be_silenced,
)
from IPython.utils.text import DollarFormatter

from rlhf_audit_nb.config import ENV_PERSON_PASSPHRASE, AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, GateError, PrivacyError, TrailError
from rlhf_audit_nb.notebook.history import CellHistory, cell_number

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.capture.cells import CellContext
    from rlhf_audit_nb.notebook.panels import RunPanel
    from rlhf_audit_nb.trail import Verdict

__all__ = ["AuditMagics", "load_ipython_extension", "unload_ipython_extension"]

# IPython's decorators are untyped.
magic_arguments: Any = _arguments.magic_arguments
argument: Any = _arguments.argument

CELL = "audit_train"
LINE = "audit"
_SHOWN = ("status", "verify", "report", "card", "budget", "lineage", "evaluations", "compute")
COMMANDS = (*_SHOWN, "run", "attest", "diff", "gate", "privacy-check", "doctor", "overhead")
_TARGETED = ("run", "attest", "diff", "gate")
_OF_FILES = ("verify", "report", "card", "lineage", "evaluations", "compute")
"""Commands that are of this notebook's trail here, and of any record or trail at the command line."""
SHELL_COMMANDS = (
    *("anchor", "annotations", "bundle", "demo", "disclose", "erase", "keys", "labels", "publish", "replay"),
    *("reproduce", "sweep", "trail", "witness"),
)
"""Commands that the command line has and ``%audit`` has not."""
_MATCHER = "rlhf_audit_nb"
_VERDICT = ("rlhf_audit_nb.trail.verdict", "Verdict")

_PRIVACY_OPTIONS = (
    "delta",
    "unit",
    "run_epsilon",
    "noise_multiplier",
    "clipping_norm",
    "sampling_rate",
    "max_pairs_per_unit",
    "sampled",
    "annotator_column",
    "engine",
    "micro_batch",
    "public_prompts",
    "loss_noise",
    "loss_bound",
    "canaries",
)
_AUDIT_OPTIONS = ("trail", "origin", "durability", "asynchronous", "every_steps", "weights_every")


@magics_class
class AuditMagics(Magics):
    """The two magics; they remember the last trail that a cell used, and ``history`` what has run."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._trail: str | None = None
        self._auditor: AuditableRLHF | None = None
        self._told: set[str] = set()
        self.history = CellHistory(shell)

    @no_var_expand
    @output_can_be_silenced
    @magic_arguments()
    @argument("--experiment", metavar="NAME", help="name of the experiment (required)")
    @argument("--epsilon", type=float, metavar="E", help="privacy budget of the whole trail; without it no privacy")
    @argument("--delta", type=float, metavar="D", help="chance with which the bound may fail (default 1e-5)")
    @argument("--unit", choices=["annotator", "pair", "label"], help="what is protected (default annotator)")
    @argument("--run-epsilon", type=float, metavar="E", help="what this run alone may add (default: all that is left)")
    @argument("--noise-multiplier", type=float, metavar="S", help="noise; default: calibrated to the budget")
    @argument("--clipping-norm", type=float, metavar="C", help="bound on one unit's gradient (default 1.0)")
    @argument(
        "--sampling-rate", type=float, metavar="Q", help="chance of each unit per step (default: from batch size)"
    )
    @argument("--sampled", choices=("units", "pairs"), help="what is drawn and clipped as one (default units)")
    @argument("--max-pairs-per-unit", type=int, metavar="K", help="pairs of a unit in one step, at most (default 8)")
    @argument("--annotator-column", metavar="COLUMN", help="column with the annotator's id (default annotator_id)")
    @argument("--engine", choices=["auto", "loop", "rows"], help="how units' gradients are computed (default auto)")
    @argument("--micro-batch", type=int, metavar="N", help="rows in the model at once (default: the batch size)")
    @argument(
        "--public-prompts",
        action="store_const",
        const=True,
        help="no protected person wrote the prompts of GRPO or RLOO (you declare it)",
    )
    @argument("--loss-noise", metavar="R", help="noise of the live loss, in the gradient's; off: none (default 10)")
    @argument("--loss-bound", type=float, metavar="B", help="clip of a unit's live loss (default: by the trainer)")
    @argument("--canaries", type=int, metavar="M", help="canaries that audit the training's epsilon (default: none)")
    @argument("--model-name", metavar="NAME", help="the model's name, declared until a trainer shows it")
    @argument("--trail", metavar="FOLDER", help="where the trail lies (default: RLHF_AUDIT_TRAIL, else ./audit)")
    @argument("--origin", metavar="NAME", help="name of a new trail, such as example.com/alignment")
    @argument("--durability", choices=["batched", "always"], help="how entries are synced (default batched)")
    @argument(
        "--asynchronous",
        action=BooleanOptionalAction,
        help="whether recording returns before an entry is synced (default: with batched, not with always)",
    )
    @argument("--every-steps", type=int, metavar="N", help="one step entry every N steps (default 1)")
    @argument(
        "--weights-every", type=int, metavar="N", help="digest of the weights every N steps (default: at the end)"
    )
    @argument("--compliance-mode", metavar="MODE", help="framework of the reports (default eu_ai_act)")
    @line_cell_magic
    def audit_train(self, line: str, cell: str | None = None) -> Any:
        """Train inside an audited run: everything that a trainer does in this cell goes into the signed trail.

        With ``--epsilon`` the trainer is made differentially private; without, it is recorded as it is::

            %%audit_train --experiment safety_alignment --epsilon 8 --delta 1e-5 --unit annotator
            trainer = DPOTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
            trainer.train()

        ``{name}`` and ``$name`` in the line take values from the notebook: ``--epsilon {epsilon}``.
        """
        __tracebackhide__ = True
        options = _parse(AuditMagics.audit_train, line, self.shell)
        if cell is None:
            raise ConfigError(
                "audit_train audits a whole cell.",
                next_step="Write %%audit_train (two percent signs) as the first line, and the training below it.",
                code="usage",
            )
        code, last = _compile(self.shell, cell)
        auditor = self._open(options)
        for sentence in auditor.recovered():
            if sentence not in self._told:
                self._told.add(sentence)
                print(sentence)  # noqa: T201  in a notebook, this is where a person reads
        source = self._source(line, cell)
        cell_context = self.history.context(source)
        return _run_cell(self.shell, auditor, options.experiment, source, cell_context, code, last)

    @no_var_expand
    @magic_arguments()
    @argument("command", nargs="?", metavar="COMMAND", help=f"{', '.join(COMMANDS)} (default status)")
    @argument(
        "target",
        nargs="?",
        metavar="FILE|MODEL",
        help="run: what to execute; attest: what to sign; gate: MODEL; diff: a record",
    )
    @argument("other", nargs="?", metavar="RECORD", help="diff: another record")
    @argument("--trail", metavar="FOLDER", help="another trail than the one used last")
    @argument("--format", metavar="FORMAT", help="report: html or pdf; card: eu_standard or huggingface")
    @argument("--out", "-o", metavar="FILE", help="save the report, card, lineage or budget (.svg, .png or .json)")
    @argument("--noise-multiplier", type=float, metavar="S", help="budget: how many steps at this noise are left?")
    @argument("--steps", type=int, metavar="T", help="budget: which noise lets so many steps fit?")
    @argument("--sampling-rate", type=float, metavar="Q", help="budget: the chance of each unit per step of these")
    @argument("--epsilon", type=float, metavar="E", help="budget: another budget than the one in force, to try it")
    @argument("--population", type=int, metavar="N", help="budget: for this population (0: new annotators)")
    @argument("--json", action="store_true", help="budget, compute, overhead: as plain values")
    @argument("--compliance-mode", metavar="MODE", help="framework of the report (default eu_ai_act)")
    @argument("--record", action="store_true", help="privacy-check, gate: write what was found into the trail")
    @argument("--policy", metavar="FILE", help="gate: what has to hold")
    @argument("--records", action="append", metavar="FOLDER", help="gate: where the model's record may be")
    @argument("-p", "--parameter", nargs=2, action="append", metavar=("NAME", "VALUE"), help="run: repeatable")
    @argument("--kernel", metavar="NAME", help="run: another kernel than the notebook names")
    @argument("--cell-timeout", type=int, metavar="SECONDS", help="run: bound on one cell (default: none)")
    @argument("--role", metavar="ROLE", help="attest: in which you sign, such as 'compliance officer'")
    @argument("--statement", metavar="TEXT", help="attest: what you have looked at and what you decide")
    @argument("--name", metavar="NAME", help="attest: your printed name (default: that of the key)")
    @argument("--meaning", metavar="MEANING", help="attest: approved (default), reviewed, responsible, authored, …")
    @argument("--reject", action="store_true", help="attest: refuse it")
    @argument("--for", dest="purpose", metavar="PURPOSE", help="attest: the use that you speak of (default: any)")
    @argument("--key", metavar="NAME|FILE", help="attest: your key (default: the one person's that is here)")
    @argument("--full", action="store_true", help="doctor: verify every entry, not only the newest")
    @line_magic
    def audit(self, line: str) -> Any:
        """Look at the trail: ``%audit status``, ``verify``, ``report``, ``card``, ``budget``, ``lineage``,
        ``evaluations``, ``compute``, ``run``, ``attest``, ``diff``, ``gate``, ``privacy-check``, ``doctor`` or
        ``overhead``.

        ``%audit report --format html --out report.html`` writes the compliance report; without ``--out`` it is shown.
        ``%audit budget --noise-multiplier 2 --sampling-rate 0.1`` tells how many steps are left.
        ``%audit run other.ipynb -p epsilon 2`` executes another notebook into a signed record.
        """
        __tracebackhide__ = True
        _refuse_shell_commands(line)
        options = _parse(AuditMagics.audit, line, self.shell)
        command = options.command or "status"
        if command not in COMMANDS:
            raise ConfigError(
                f"%audit has no command {command!r}.{_did_you_mean(command, COMMANDS)}",
                next_step=f"Write one of: {', '.join(COMMANDS)}.",
                code="usage",
            )
        if options.target is not None and command not in _TARGETED:
            if command in _OF_FILES:
                raise ConfigError(
                    f"%audit: {command} takes no {options.target!r}: it is about this notebook's own trail.",
                    next_step=f"For a file write !rlhf-audit {command} {options.target}.",
                    code="usage",
                )
            _wrong(AuditMagics.audit, f"{command} takes no {options.target!r}")
        if options.other is not None and command != "diff":
            _wrong(AuditMagics.audit, f"{command} takes no {options.other!r}")
        auditor = self._auditor_for(options)
        action: Callable[[AuditableRLHF, Any], Any] = getattr(self, f"_{command.replace('-', '_')}")
        return action(auditor, options)

    # --- %audit ------------------------------------------------------------------------------------------------------

    def _status(self, auditor: AuditableRLHF, _: Any) -> Any:
        return auditor.status()

    def _verify(self, auditor: AuditableRLHF, _: Any) -> Any:
        return _sound(auditor.verify(), "trail")

    def _run(self, auditor: AuditableRLHF, options: Any) -> Any:
        from rlhf_audit_nb.notebook.running import progress_line, refuse_itself
        from rlhf_audit_nb.records import open_record, read_parameters
        from rlhf_audit_nb.records.run import NotebookFailedError

        if options.target is None:
            _wrong(AuditMagics.audit, "run takes a notebook")
        if options.cell_timeout is not None and options.cell_timeout < 1:
            _wrong(AuditMagics.audit, "--cell-timeout takes at least one second")
        refuse_itself(options.target, self.shell.user_ns if self.shell is not None else {})
        pairs = options.parameter or []
        if len(dict(pairs)) < len(pairs):
            _wrong(AuditMagics.audit, "a parameter is given twice")
        values = read_parameters(options.target, dict(pairs))
        given = {"kernel_name": options.kernel, "cell_timeout": options.cell_timeout}
        try:
            result = auditor.run_notebook(options.target, options.out, values, progress=progress_line(), **given)
        except NotebookFailedError as error:
            if error.said:
                print(error.said)  # noqa: T201  what was raised in the other notebook
            raise
        print(f"Record {result.path}")  # noqa: T201
        return _sound(open_record(result.path).verdict, "record")

    def _report(self, auditor: AuditableRLHF, options: Any) -> Any:
        report = auditor.generate_compliance_report(format=options.format or _suffix(options.out) or "html")
        return _saved(report, options.out)

    def _card(self, auditor: AuditableRLHF, options: Any) -> Any:
        card = auditor.generate_model_card(format=options.format or "eu_standard")
        return _saved(card, options.out)

    def _budget(self, auditor: AuditableRLHF, options: Any) -> Any:
        asked = _given(options, ("noise_multiplier", "steps", "sampling_rate", "epsilon", "population"))
        if not asked:
            return _saved(_plain_or_shown(auditor.budget(), options), options.out)
        if "sampling_rate" not in asked or not {"noise_multiplier", "steps"} & set(asked):
            _wrong(AuditMagics.audit, "what is left takes --sampling-rate, and --noise-multiplier or --steps")
        return _plain_or_shown(auditor.steps_left(**asked), options)

    def _lineage(self, auditor: AuditableRLHF, options: Any) -> Any:
        return _saved(auditor.lineage(), options.out)

    def _evaluations(self, auditor: AuditableRLHF, options: Any) -> Any:
        return _saved(auditor.evaluations(), options.out)

    def _compute(self, auditor: AuditableRLHF, options: Any) -> Any:
        return _plain_or_shown(auditor.compute(), options)

    def _attest(self, auditor: AuditableRLHF, options: Any) -> Any:
        if options.target is None or options.role is None or options.statement is None:
            _wrong(AuditMagics.audit, "attest takes a record, --role and --statement")
        said = _given(options, ("role", "statement", "name", "meaning", "purpose", "key"))
        return auditor.attest(options.target, reject=options.reject, passphrase=_person_passphrase(options), **said)

    def _gate(self, auditor: AuditableRLHF, options: Any) -> Any:
        if options.target is None or options.policy is None:
            _wrong(AuditMagics.audit, "gate takes a model's folder and --policy")
        found = auditor.gate(
            options.target, options.policy, records=options.records or (), trail=options.trail,
            record_decision=options.record,
        )  # fmt: skip
        if not found.passed:
            from IPython.display import display

            display(found)  # type: ignore[no-untyped-call]
            raise GateError(
                f"{found.subject} may not be used: {found.unmet[0].reason}",
                next_step=f"`rlhf-audit gate --json` gives every reason ({len(found.unmet)}).",
            )
        return found

    def _diff(self, auditor: AuditableRLHF, options: Any) -> Any:
        if options.target is None or options.other is None:
            _wrong(AuditMagics.audit, "diff takes two records")
        return _saved(_plain_or_shown(auditor.diff(options.target, options.other), options), options.out)

    def _privacy_check(self, auditor: AuditableRLHF, options: Any) -> Any:
        found = auditor.privacy_check(record=options.record)
        if not found.passed:
            from IPython.display import display

            display(found)  # type: ignore[no-untyped-call]
            raise PrivacyError(
                str(found),
                next_step="Run `rlhf-audit privacy-check` in a terminal; install what constraints.txt names.",
                code="privacy-check",
            )
        return found

    def _doctor(self, auditor: AuditableRLHF, options: Any) -> Any:
        found = auditor.doctor(full=options.full)
        if found.exit_code:
            from IPython.display import display

            display(found)  # type: ignore[no-untyped-call]
            failed = [finding for finding in found.findings if finding.status == "fail"]
            raise TrailError(f"{failed[0].check}: {failed[0].message}", next_step=failed[0].next_step, code="doctor")
        return found

    def _overhead(self, auditor: AuditableRLHF, options: Any) -> Any:
        found = auditor.overhead()
        if found.private:
            raise PrivacyError(
                "The last run was private: how long it took depends on private data, and a notebook is passed on.",
                next_step="Run `rlhf-audit overhead` in a terminal.",
                code="private-times",
            )
        return _plain_or_shown(found, options)

    # --- auditors ----------------------------------------------------------------------------------------------------

    def _open(self, options: Any) -> AuditableRLHF:
        """The auditor for one audited cell."""
        from rlhf_audit_nb.auditor import AuditableRLHF

        privacy = _privacy(options)
        audit = AuditConfig(**_given(options, _AUDIT_OPTIONS))
        auditor = AuditableRLHF(
            model_name=options.model_name,
            privacy_config=privacy,
            audit_config=audit,
            **_given(options, ("compliance_mode",)),
        )
        self._auditor = auditor
        self._trail = options.trail
        return auditor

    def _auditor_for(self, options: Any) -> AuditableRLHF:
        """The last cell's auditor, or one for the trail that is named."""
        from rlhf_audit_nb.auditor import AuditableRLHF

        same_trail = options.trail is None or options.trail == self._trail
        if self._auditor is not None and same_trail and options.compliance_mode is None:
            return self._auditor
        trail = options.trail or self._trail
        privacy = self._auditor.privacy_config if self._auditor is not None and same_trail else None
        return AuditableRLHF(
            privacy_config=privacy, audit_config=AuditConfig(trail=trail), **_given(options, ("compliance_mode",))
        )

    def _source(self, line: str, cell: str) -> str:
        """The cell as it stands in the notebook: what a kernel was sent, or put together again."""
        get_parent = getattr(self.shell, "get_parent", None)
        parent = get_parent() if get_parent is not None else {}
        code = parent.get("content", {}).get("code") if isinstance(parent, dict) else None
        if isinstance(code, str) and f"%%{CELL}" in code:
            return code
        return f"%%{CELL} {line}".rstrip() + "\n" + cell


# --- running the cell ------------------------------------------------------------------------------------------------


def _run_cell(
    shell: Any, auditor: AuditableRLHF, experiment: str, source: str, cell: CellContext, code: Any, last: Any
) -> Any:
    """Run the compiled cell inside a run, with the panel; returns the value of its last expression."""
    __tracebackhide__ = True
    from rlhf_audit_nb.notebook.panels import RunPanel

    digest = hashlib.sha256(source.encode()).hexdigest()
    run = auditor.open_run(experiment, entry_point="cell", cell_digest=digest, cell=cell, show_progress=False)
    latest: list[Verdict] = []

    def verify() -> Verdict:
        latest.clear()
        latest.append(auditor.verify())
        return latest[0]

    panel = RunPanel(run.state, auditor.trail.status, verify)
    try:
        with run:
            panel.start()
            return _execute(shell, code, last)
    finally:
        if run.state.finished:  # not where the run could not even be opened
            _freeze(panel)
            print(auditor.closing_line(run, *latest))  # noqa: T201


def _freeze(panel: RunPanel) -> None:
    """The panel's last picture. A panel that cannot be drawn is told of and does not fail a training that is done."""
    try:
        panel.finish()
    except Exception as error:  # whatever a picture can fail with; the trail is written all the same
        warnings.warn(f"The panel could not be drawn ({type(error).__name__}: {error}).", stacklevel=2)


def _execute(shell: Any, code: Any, last: Any) -> Any:
    __tracebackhide__ = True
    exec(code, shell.user_ns)  # noqa: S102  the user's own cell
    return eval(last, shell.user_ns) if last is not None else None  # noqa: S307


def _compile(shell: Any, cell: str) -> tuple[Any, Any]:
    """The body as IPython compiles a cell, its last expression apart so that its value can be shown."""
    transformed = shell.transform_cell(cell)
    name = shell.compile.cache(transformed, cell_number(shell), raw_code=cell)
    tree = shell.transform_ast(shell.compile.ast_parse(transformed, filename=name))
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = shell.compile(ast.Expression(tree.body.pop().value), name, "eval")
    return shell.compile(tree, name, "exec"), last


# --- the line --------------------------------------------------------------------------------------------------------


def _parse(magic: Any, line: str, shell: Any) -> Any:
    """The options of a magic's line.

    Raises:
        ConfigError: something on the line cannot be understood; the message says what, and what comes close.
    """
    expanded = _expand(line, shell)
    try:
        words = shlex.split(expanded)
    except ValueError as error:
        raise ConfigError(
            f"The line of {_name(magic)} cannot be read: {error}.",
            next_step="Close every quotation mark.",
            code="usage",
        ) from error
    _refuse_unknown(magic, words)
    try:
        options = magic.parser.parse_args(words)
    except UsageError as error:
        _wrong(magic, str(error))
    if getattr(options, "experiment", "") is None:
        _wrong(magic, "--experiment is missing")
    return options


def _expand(line: str, shell: Any) -> str:
    """``$name`` and ``{expression}`` replaced by values from the notebook."""
    try:
        return str(DollarFormatter().vformat(line, (), dict(shell.user_ns)))
    except NameError as error:
        missing = error.name or str(error)
        raise ConfigError(
            f"The line uses {missing!r}, which is not defined in this notebook.{_did_you_mean(missing, shell.user_ns)}",
            next_step="Run the cell that sets it first, or write the value itself.",
            code="undefined-variable",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"The line's {{…}} cannot be evaluated: {type(error).__name__}: {error}.",
            next_step="Write a name such as {epsilon}, or the value itself.",
            code="usage",
        ) from error


def _refuse_unknown(magic: Any, words: Sequence[str]) -> None:
    known = [option for action in magic.parser._actions for option in action.option_strings]  # noqa: SLF001  argparse has no public list
    for word in words:
        name = word.split("=", 1)[0]
        if re.match(r"--?[A-Za-z]", name) and name not in known:
            raise ConfigError(
                f"{_name(magic)} has no option {name}.{_did_you_mean(name, known)}",
                next_step=f"{_name(magic)}? lists the options.",
                code="unknown-option",
            )


def _refuse_shell_commands(line: str) -> None:
    """Lead to the command line who asks for what it alone has, before its options are found to be unknown."""
    words = line.split()
    if words and words[0] in SHELL_COMMANDS:
        raise ConfigError(
            f"%audit has no command {words[0]!r}; the command line has it.",
            next_step=f"Write !rlhf-audit {' '.join(words)}.",
            code="usage",
        )


def _wrong(magic: Any, message: str) -> NoReturn:
    raise ConfigError(
        f"{_name(magic)}: {message.rstrip('.')}.", next_step=f"{_name(magic)}? shows how it is written.", code="usage"
    )


def _name(magic: Any) -> str:
    return f"%%{CELL}" if magic.__name__ == CELL else f"%{LINE}"


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(item) for item in known], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _given(options: Any, names: Sequence[str]) -> dict[str, Any]:
    """The options among ``names`` that stand on the line."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _privacy(options: Any) -> PrivacyConfig | None:
    given = _given(options, _PRIVACY_OPTIONS)
    if "loss_noise" in given:
        given["loss_noise"] = _loss_noise(given["loss_noise"])
    if options.epsilon is not None:
        return PrivacyConfig(epsilon=options.epsilon, **given)
    if given:
        # Trained without privacy although privacy was meant: the worst way to misread a line.
        wanted = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(
            f"%%audit_train has {wanted} but no --epsilon, so nothing would be private.",
            next_step="Add --epsilon (such as --epsilon 8), or leave the privacy options out.",
            code="epsilon",
        )
    return None


def _person_passphrase(options: Any) -> str | None:
    """The passphrase of a person's key, asked for where it is needed; never on the line, which a notebook keeps."""
    from getpass import getpass

    from rlhf_audit_nb.trail.home import home_folder
    from rlhf_audit_nb.trail.people import choose_person_key

    chosen = choose_person_key(home_folder(), options.key, options.name)
    if os.environ.get(ENV_PERSON_PASSPHRASE) or not chosen.encrypted:
        return None
    try:
        return getpass(f"Passphrase of the key of {chosen.name}: ")
    except NotImplementedError:  # nobody sits at this kernel; signing says what to set
        return None


def _sound(verdict: Verdict, what: str) -> Verdict:
    """The verdict, where it says that nothing was changed.

    Raises:
        TrailError: it says otherwise.
    """
    if verdict.level.name in ("INVALID", "DIVERGED"):
        first = verdict.reasons[0] if verdict.reasons else None
        why = f" {first.where}: {first.message}" if first is not None else ""
        raise TrailError(
            f"The {what} {verdict.origin} is {verdict.level.name}.{why}",
            next_step=f"Run `rlhf-audit verify --json` for every reason; do not rely on this {what}.",
            code=verdict.level.name.lower(),
        )
    return verdict


def _plain_or_shown(result: Any, options: Any) -> Any:
    return result.to_dict() if options.json and options.out is None else result


def _loss_noise(said: str) -> float | None:
    if said == "off":
        return None
    try:
        return float(said)
    except ValueError as error:
        raise ConfigError(
            f"--loss-noise is {said!r}, which is neither a number nor off.",
            next_step="Write --loss-noise 10, or --loss-noise off for no live loss.",
            code="loss_noise",
        ) from error


def _suffix(out: str | None) -> str | None:
    return Path(out).suffix.removeprefix(".") or None if out else None


def _saved(result: Any, out: str | None) -> Any:
    if out is None:
        return result
    result.save(Path(out))
    print(f"Saved {out}")  # noqa: T201
    return None


# --- the extension ---------------------------------------------------------------------------------------------------


@context_matcher(identifier=_MATCHER, priority=120)
def _complete(context: Any) -> dict[str, Any]:
    """Options, their choices and the commands of the two magics."""
    line = context.line_with_cursor
    match = re.match(rf"\s*%%?({CELL}|{LINE})\b(.*)$", line)
    if match is None:
        return {"completions": [], "suppress": False}
    parser = getattr(AuditMagics, match.group(1)).parser
    words = match.group(2).split(" ")
    names = _candidates(parser, words[-2] if len(words) > 1 else "", is_line=match.group(1) == LINE)
    found = [SimpleCompletion(name) for name in names if name.startswith(words[-1])]
    return {"completions": found, "matched_fragment": words[-1], "suppress": bool(found)}


def _candidates(parser: Any, before: str, *, is_line: bool) -> list[str]:
    actions = parser._actions  # noqa: SLF001  argparse has no public list
    for action in actions:
        if before and before in action.option_strings:
            return [str(choice) for choice in action.choices or ()]
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    return [*COMMANDS, *options] if is_line else options


def _verdict_html(verdict: Any) -> str:
    """A verdict as a notebook shows it: the level, how far it reaches, and what it covers."""
    from rlhf_audit_nb.compliance.words import level_words

    words = level_words(verdict.level.name)
    rows = {
        "shows": words.shows,
        "does not show": words.not_shown,
        "trail": verdict.origin,
        "entries": verdict.size,
        "root": verdict.root,
        "signed by": verdict.signed_by or "nobody known",
        "runs": ", ".join(f"{run.run[:8]} {run.status}" for run in verdict.runs) or "none",
        "reasons": "; ".join(f"{reason.where}: {reason.message}" for reason in verdict.reasons) or "none",
    }
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(verdict.level.name)}</caption>{cells}</table>"


def _verdict_text(verdict: Any, printer: Any, cycle: bool) -> None:  # noqa: FBT001  IPython's own signature
    del cycle
    runs = f"{len(verdict.runs)} run{'' if len(verdict.runs) == 1 else 's'}"
    reasons = "".join(f"\n  {reason.where}: {reason.message}" for reason in verdict.reasons)
    printer.text(f"{verdict.level.name}: {verdict.origin}, {verdict.size} entries, {runs}{reasons}")


def _formatters(shell: Any) -> list[tuple[Any, Any]]:
    found = shell.display_formatter.formatters
    return [(found["text/html"], _verdict_html), (found["text/plain"], _verdict_text)]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, their completion, and how a verdict shows."""
    magics = AuditMagics(shell)
    shell.register_magics(magics)
    magics.history.watch()
    for formatter, show in _formatters(shell):
        formatter.for_type_by_name(*_VERDICT, show)  # by name: the trail is imported when it is used
    completer = getattr(shell, "Completer", None)
    if completer is not None and _complete not in completer.custom_matchers:
        completer.custom_matchers.append(_complete)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take them away again."""
    manager = shell.magics_manager
    magic = manager.magics["line"].get(LINE)
    if magic is not None:
        magic.__self__.history.forget()
    manager.magics["cell"].pop(CELL, None)
    for name in (CELL, LINE):
        manager.magics["line"].pop(name, None)
    for formatter, _ in _formatters(shell):
        formatter.pop(".".join(_VERDICT), None)
    completer = getattr(shell, "Completer", None)
    if completer is not None and _complete in completer.custom_matchers:
        completer.custom_matchers.remove(_complete)
