"""Command-line arguments of the scripts, declared once as the fields of a dataclass, and how a script is run."""

import argparse
import dataclasses
import difflib
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import Field, field
from pathlib import Path

from transformers import HfArgumentParser

from scrdit_diffusers.redaction import redact

AMBIGUOUS = re.compile(r"(--[\w-]+=).*(?= could match )", re.DOTALL)  # a flag that argparse shows with its value
MAY_CHANGE = " (A resumed run may change it.)"


class Join(argparse.Action):
    """Joins the values of a flag that is given several times; the first ones replace the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Add values to those of the namespace."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else before + values)


def arg(default, help, may_change=False, **kwargs):
    """Declare a command-line argument: its default, its help, and whether a resumed run may change it."""
    metadata = {"help": help + MAY_CHANGE * may_change, **kwargs}  # argparse takes all of it
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata | {"action": Join})
    return field(default=default, metadata=metadata)


def may_change(argument: Field) -> bool:
    """Whether a resumed run may change an argument made by [`arg`]."""
    return argument.metadata["help"].endswith(MAY_CHANGE)


def check_numbers(arguments, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise ValueError for numbers that are out of range, or not finite; `None` passes.

    Parameters
    ----------
    arguments
        A dataclass whose fields are made by [`arg`].
    positive
        Names of the arguments that must be above zero.
    not_negative
        Names of those that may also be zero.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be a finite number, got {value}; for no limit, give a large one.")
        if name in positive and value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
        if name in not_negative and value is not None and value < 0:
            raise ValueError(f"--{name} must be at least 0, got {value}.")


def parse(arguments_class):
    """Parse the command line into a dataclass whose fields are made by [`arg`].

    `sys.argv` is left without credentials: trackers record it, too.

    Raises
    ------
    ValueError
        A flag is unknown. Its value is not shown: after a mistyped `--hub_token` it is a credential.
    """
    parser = HfArgumentParser(arguments_class)
    parser.error = lambda message: type(parser).error(parser, redact(AMBIGUOUS.sub(r"\1***", message)))
    arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    words, sys.argv[:] = sys.argv[:], redact(sys.argv)
    if unknown:
        known = [f"--{argument.name}" for argument in dataclasses.fields(arguments_class)]
        names = [word.partition("=")[0] for word in unknown]
        flags = [name for name in names if re.fullmatch(r"--[A-Za-z][\w-]*", name)]
        closest = [match for flag in flags for match in difflib.get_close_matches(flag.replace("-", "_"), known, n=1)]
        if flags:
            meant = f", did you mean {closest}?" if closest else "."
            raise ValueError(f"Unknown flags {flags}{meant} --help lists all.")
        raise ValueError(f"Word {words.index(unknown[0])} after the script's name belongs to no flag.")
    return arguments


def run(main: Callable, arguments_class: type, expected: tuple[type[Exception], ...]) -> None:
    """Run the main function of a script with its arguments; expected errors end it with their message alone.

    Neither messages nor tracebacks nor what is logged show credentials.
    """
    make_record = logging.getLogRecordFactory()

    def make_redacted_record(*args, **kwargs) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make_redacted_record)
    sys.excepthook = lambda *error: print(redact("".join(traceback.format_exception(*error))), file=sys.stderr)
    try:
        main(parse(arguments_class))
    except expected as error:
        sys.exit(f"error: {redact(str(error))}")


def read_genes(path):
    """Read a text file with one gene name per line; a name may hold blanks."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--genes {path} is not text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]
