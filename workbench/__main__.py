"""The command line: `python -m workbench COMMAND`, each command a module of `commands`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from workbench.errors import WorkbenchError
from workbench.live.outputs import visible

COMMANDS = {  # name of the module: what it does
    "doctor": "what works on this machine, and how to cure what does not",
    "runs": "list, compare and delete runs",
    "sweep": "run a notebook with many parameters, one run folder each",
    "launch": "run one training as several processes of this machine",
}
ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit statuses, as shells have them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; without one, list them.

    Only the module of the command that is called is imported.

    Args:
        arguments: the command and what follows it; None for the process's own.

    Returns:
        the exit status: the command's own; 2 after an error that the user can cure, which is
        then one line on stderr, as warnings are; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":  # "?" for what the terminal cannot show
            stream.reconfigure(errors="replace")
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        _parser().print_help()
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        _parser().error(f"no command {visible(name)!r}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(name, message)
            status = _run(name, rest)
        sys.stdout.flush()
        return status
    except WorkbenchError as error:
        _say(name, error)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; at exit Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _say(name: str, what: Exception) -> None:
    """One line on stderr, in which nothing acts on the terminal."""
    sys.stderr.write(f"{name}: {' '.join(visible(str(what)).split())}\n")


def _run(name: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f"workbench.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m workbench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    listed = [f"  {name:<8} {what}" for name, what in COMMANDS.items()]
    return argparse.ArgumentParser(
        prog="python -m workbench",
        usage="python -m workbench COMMAND …, or COMMAND --help",
        description="\n".join(["commands:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
