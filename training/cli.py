"""Command-line arguments of the scripts, declared once as the fields of a dataclass."""

from dataclasses import Field, field

from transformers import HfArgumentParser

MAY_CHANGE = " (A resumed run may change it.)"


def arg(default, help, may_change=False, **kwargs):
    """One command-line argument: its default, its help, and whether a resumed run may change it."""
    metadata = {"help": help + MAY_CHANGE * may_change, **kwargs}  # argparse takes all of it
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def may_change(argument: Field) -> bool:
    """Whether a resumed run may change an argument made by [`arg`]."""
    return argument.metadata["help"].endswith(MAY_CHANGE)


def parse(arguments_class):
    """Parse the command line into a dataclass whose fields are made by [`arg`]."""
    return HfArgumentParser(arguments_class).parse_args_into_dataclasses()[0]
