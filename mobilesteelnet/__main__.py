"""The program ``mobilesteelnet``: runs a command and turns its errors into one line and a code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

USAGE, DATA, CHECKPOINT, TRAINING, FILES, FAULT, INTERRUPTED = 2, 3, 4, 5, 6, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; None takes them from the process.

    Returns:
        The exit code, as ``mobilesteelnet --help`` lists them.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _answer(given)
    except KeyboardInterrupt:  # also one that comes while an error is explained
        return _fail("interrupted", INTERRUPTED)


def _answer(given: list[str]) -> int:
    try:
        return _run(given)
    except BrokenPipeError:
        # The reader of our output has gone (as with `| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FILES
    except Exception as error:
        message, code = _explain(error)
        if "--debug" in given:
            traceback.print_exc()
        return _fail(message, code)


def _run(arguments: list[str]) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as error:
        return _fail(f'{error.name} is missing: pip install "mobilesteelnet[cli]"', USAGE)
    from .allocator import keep_freed_memory
    from .cli import app

    _refuse_empty(arguments)
    keep_freed_memory()
    if os.environ.get("COLUMNS") == "0":  # a terminal that has not been told its size
        del os.environ["COLUMNS"]
    encoding = getattr(sys.stdout, "encoding", None)  # no stream where the output is closed
    if encoding and encoding.lower() not in ("utf-8", "utf8"):
        # Names of files may hold what it does not have.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Pillow warns of pictures that are refused by name (`pictures.decode`).
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    try:
        code = typer.main.get_command(app).main(
            args=arguments, prog_name="mobilesteelnet", standalone_mode=False
        )
    except typer.Exit as done:
        code = done.exit_code
    except SystemExit as done:
        if done.code != 1:
            raise
        raise BrokenPipeError from None  # what typer makes of it: 1 would mean bad pictures
    except typer.Abort:
        return _fail("interrupted", INTERRUPTED)
    if code == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse an empty argument, as of a shell's unset variable: as a path it is this folder.

    Raises:
        ValueError: There is one.
    """
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        empty = ""
        if not argument:
            empty = before if before.startswith("-") else "an argument"
        elif name.startswith("--") and equals and not value:
            empty = name
        if empty and empty != "--note":
            raise ValueError(f"{empty} is empty: a variable that is not set?")
        before = argument


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error."""
    import typer

    usage_error = typer.BadParameter.__mro__[1]  # click's class, wherever typer keeps click
    if isinstance(error, usage_error):
        return error.format_message(), USAGE  # type: ignore[attr-defined]  # click's method
    if isinstance(error, ImportError) and "pip install" in str(error):
        return str(error), USAGE
    from fused import BackendError

    from .checkpoint import CheckpointError
    from .pictures import DataError

    for kind, code in ((CheckpointError, CHECKPOINT), (DataError, DATA), (BackendError, USAGE)):
        if isinstance(error, kind):
            return str(error), code
    names = [kind.__name__ for kind in type(error).__mro__]
    if "TrainingError" in names:  # its module needs the extra [train]
        return str(error), TRAINING
    if type(error).__name__ == "ExportError":  # its module needs the extra [export]
        return str(error), FILES
    if isinstance(error, ValueError):
        return str(error), USAGE
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        return f"{error.filename}: {text}" if error.filename else text, FILES
    return f"{type(error).__name__}: {error} (--debug shows where)", FAULT


def _fail(message: str, code: int) -> int:
    line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
    if not line:  # without a command typer shows its help, which is all there is to say
        return code
    # Names of files may hold what the terminal's encoding does not have.
    encoding = sys.stderr.encoding or "utf-8"
    safe = line.encode(encoding, "backslashreplace").decode(encoding)
    print(f"error: {safe}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
