"""Ctrl-C waits for the end of a block."""

import signal
import threading

import pytest

from workbench.tuning.interrupts import DeferredInterrupt


def interrupted_block(log, error=None):
    with DeferredInterrupt() as interrupt:
        log.append(interrupt.requested)
        signal.raise_signal(signal.SIGINT)
        log.append(interrupt.requested)
        if error:
            raise error


def test_an_interrupt_is_raised_when_the_block_is_done():
    log, handler = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted_block(log)
    assert log == [False, True]
    assert signal.getsignal(signal.SIGINT) is handler


def test_without_an_interrupt_nothing_is_raised_and_it_can_be_used_again():
    deferred, handler = DeferredInterrupt(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred:
        signal.raise_signal(signal.SIGINT)
    with deferred:
        pass
    assert not deferred.requested
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_inside_the_block_comes_through_and_the_handler_is_restored():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="mine"):
        interrupted_block([], RuntimeError("mine"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_runs_the_block_unprotected():
    ran = []

    def work():
        with DeferredInterrupt():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGINT)]
