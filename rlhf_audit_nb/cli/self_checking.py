"""Check: ``privacy-check``. Floor 6."""

from __future__ import annotations

import argparse

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, finish, note, trail_folder

__all__ = ["COMMANDS"]

FAILED = 3


def _do_check(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.capture.telemetry import no_telemetry
    from rlhf_audit_nb.privacy.self_audit import LIMITS, check_mechanism

    note("loading torch and TRL")
    with no_telemetry():
        audit = check_mechanism(
            noise_multiplier=args.noise_multiplier,
            sampling_rate=args.sampling_rate,
            steps=args.steps,
            delta=args.delta,
            engine=args.engine,
            tell=note,
        )
    result, words = audit.to_dict(), list(audit.words())
    if args.record:
        from rlhf_audit_nb.events import encode_body
        from rlhf_audit_nb.trail import Trail

        event = audit.event()
        with Trail.open(trail_folder(args)) as trail:
            index = trail.append(event.TYPE, encode_body(event)).wait()
        result["entry"] = index
        words.append(f"recorded   entry {index} of {trail_folder(args)}")
    words += ["", *LIMITS]
    return finish(args, result, words, 0 if audit.passed else FAILED)


def _add_check(parser: Parser) -> None:
    parser.set_defaults(do=_do_check)
    parser.add_argument("--noise-multiplier", type=float, default=1.0, metavar="S", help="noise to check with (1.0)")
    parser.add_argument("--sampling-rate", type=float, default=0.1, metavar="Q", help="rate to check with (0.1)")
    parser.add_argument("--steps", type=int, default=24, metavar="T", help="steps of the part that is attacked (24)")
    parser.add_argument("--delta", type=float, default=1e-5, metavar="D", help="delta of both epsilons (1e-5)")
    parser.add_argument(
        "--engine", choices=("auto", "loop", "rows"), default="auto", help="how gradients are computed (auto)"
    )
    parser.add_argument("--record", action="store_true", help="write what was found into the trail; reports show it")
    add_trail(parser)


COMMANDS = (
    Command(
        "check",
        "privacy-check",
        "test the installed privacy mechanism on phantom annotators, with a lower bound on epsilon",
        _add_check,
    ),
)
