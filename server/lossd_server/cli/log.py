"""Log lines on standard error: ours, those of libraries, warnings and what nobody caught, in one form."""

import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from lossd_server.errors import LossdError

_log = structlog.get_logger()


def configure_logging(log_format: str) -> None:
    """Has everything that this process says written as one line an event.

    Args:
        log_format: `json`, or `text` for people, where an exception takes more lines than one.
    """
    about: list[Processor] = [
        _add_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    rendering = _rendering(log_format)
    structlog.configure(
        processors=[*about, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # One write a line: threads do not mix theirs.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    _catch_libraries(about, rendering)
    sys.excepthook = _on_exception
    threading.excepthook = _on_exception_in_thread
    sys.unraisablehook = _on_unraisable
    warnings.showwarning = _on_warning


def say_why_not(error: LossdError, log_format: str) -> None:
    """Writes the one line of a start that failed."""
    if log_format == "json":
        _log.critical("cannot start", reason=str(error.reason), field=error.field, message=error.message)
    else:
        # One line, also where an operator's module raised more of them.
        sys.stderr.write(f"lossd: {' '.join(str(error).split())}\n")


def _add_trace(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Says of which trace and span a line is, where there is one."""
    if "opentelemetry.trace" in sys.modules:
        span = sys.modules["opentelemetry.trace"].get_current_span().get_span_context()
        if span.is_valid:
            event.update(trace_id=f"{span.trace_id:032x}", span_id=f"{span.span_id:016x}")
    return event


def _rendering(log_format: str) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # A caller chooses some of the text, and must not write lines of the log with it.
            repr_native_str=True,
            # Others show local variables: tensors of callers, at length.
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]


def _catch_libraries(about: list[Processor], rendering: list[Processor]) -> None:
    """Gives what libraries say through `logging` the form of ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*about, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.getLogger().handlers[:] = [handler]


def _on_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _log.critical("uncaught exception", exc_info=(kind, error, traceback))


def _on_exception_in_thread(caught: threading.ExceptHookArgs) -> None:
    name = caught.thread.name if caught.thread else None
    _log.error("uncaught exception", thread=name, exc_info=caught.exc_value)


def _on_unraisable(caught: "sys.UnraisableHookArgs") -> None:
    _log.error("uncaught exception", place=repr(caught.object), exc_info=caught.exc_value)


def _on_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **_named: Any
) -> None:
    _log.warning(str(message), category=category.__name__, place=f"{filename}:{lineno}")
