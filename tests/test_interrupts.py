"""Ctrl-C waits for the end of a block."""

import signal
import threading

import pytest

from workbench.tuning.interrupts import DeferredInterrupt, orderly_exit

pytestmark = pytest.mark.fault("interrupts")


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


def interrupted_inside(deferred, log):
    with deferred:
        with deferred:
            signal.raise_signal(signal.SIGINT)
        log.append(deferred.requested)
        with deferred:
            log.append(deferred.requested)


def test_a_block_within_a_block_is_part_of_it():
    log, handler = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted_inside(DeferredInterrupt(), log)
    assert log == [True, True]
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


def twice_interrupted(log):
    with DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        log.append("first")
        signal.raise_signal(signal.SIGINT)
        log.append("second")


def test_a_second_signal_takes_effect_at_once():
    log = []
    with pytest.raises(KeyboardInterrupt):
        twice_interrupted(log)
    assert log == ["first"]


def test_sigterm_waits_and_then_does_what_it_did_before():
    caught, log = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with DeferredInterrupt():
            signal.raise_signal(signal.SIGTERM)
            log.append(list(caught))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log == [[]]
    assert caught == [signal.SIGTERM]


def test_sigterm_leaves_in_order_where_nobody_has_taken_it():
    with pytest.raises(SystemExit) as caught, orderly_exit():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
