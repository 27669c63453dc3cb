"""One storage's bytes go to the host and come back, and its tensors do not notice.

On a CPU the "device" is the CPU as well.
"""

from __future__ import annotations

import gc

import pytest
import torch

from gptq_plugin.memory.tracked_storage import TrackedStorage, storage_key


def test_the_memory_is_given_back_while_the_bytes_are_on_the_host():
    x = torch.arange(10.0)
    half, version = x[5:], x._version
    tracked = TrackedStorage(x.untyped_storage(), owner=3)
    assert (tracked.owner, tracked.bytes(), tracked.is_empty(), tracked.host) == (3, 40, False, None)
    tracked.send(None)
    left, held = x.untyped_storage().nbytes(), tracked.bytes()  # a failing assert must not print x now
    assert (left, held) == (0, 40) and tracked.is_empty()
    assert torch.equal(tracked.host.view(torch.float32), torch.arange(10.0)) and not tracked.can_move()
    tracked.bring()
    assert torch.equal(x, torch.arange(10.0)) and torch.equal(half, x[5:]) and x._version == version
    assert not tracked.is_empty() and tracked.host is not None  # the owner drops it when the bytes may change
    tracked.empty()
    assert tracked.is_empty() and tracked.bytes() == 40
    tracked.bring()
    assert torch.equal(half, torch.arange(5.0, 10.0))


def test_a_storage_that_died_has_no_bytes_and_its_key_is_not_used_again():
    x = torch.ones(1000)
    tracked = TrackedStorage(x.untyped_storage(), owner=0)
    assert tracked.key == storage_key(x) == storage_key(x[3:])
    del x
    gc.collect()
    later = [torch.ones(1000) for _ in range(100)]
    assert tracked.key not in map(storage_key, later)
    assert tracked.storage() is None and tracked.bytes() == 0
    assert not tracked.is_empty() and not tracked.can_move()
    for nothing_happens in (lambda: tracked.send(None), tracked.bring, tracked.empty, tracked.wait):
        nothing_happens()
    assert tracked.host is None


def test_a_storage_that_died_while_it_was_away_needs_no_memory():
    x = torch.ones(1000)
    tracked = TrackedStorage(x.untyped_storage(), owner=0)
    tracked.send(None)
    del x
    tracked.bring()
    assert tracked.bytes() == 0 and tracked.storage() is None


def test_memory_that_others_read_or_that_cannot_shrink_stays():
    def can_move(x, shared=False):
        tracked = TrackedStorage(x.untyped_storage(), owner=0)
        tracked.shared = shared
        return tracked.can_move()

    x = torch.ones(10)
    assert can_move(x) and not can_move(x, shared=True)
    assert not can_move(torch.frombuffer(bytearray(40), dtype=torch.float32))
    assert not can_move(torch.ones(10).share_memory_())


def test_layouts_without_a_storage_have_no_key():
    assert storage_key(torch.eye(3).to_sparse()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True], ids=["brought", "prefetched"])
def test_on_a_gpu_copies_keep_the_order_of_the_work_around_them(ahead):
    out, back = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(2**22, device="cuda")
    tracked = TrackedStorage(x.untyped_storage(), owner=0)
    torch.cuda._sleep(200_000_000)
    x.fill_(7)  # queued behind the sleep: the copy must wait for it
    tracked.send(out)
    assert tracked.host.is_pinned() and tracked.is_empty() and tracked.can_move() is False
    other = torch.full((2**22,), 1.0, device="cuda")  # may take the memory that was given back
    if ahead:
        tracked.prefetch(back)
        assert tracked.is_coming() and not tracked.is_empty()
    tracked.bring()
    assert not tracked.is_coming()
    assert float(x.double().mean()) == 7 and float(other.double().mean()) == 1


@pytest.mark.gpu
def test_on_a_gpu_a_wait_alone_makes_prefetched_bytes_readable():
    out, back = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.arange(2.0**22, device="cuda")
    expected = x.cpu()
    tracked = TrackedStorage(x.untyped_storage(), owner=0)
    tracked.send(out)
    tracked.prefetch(back)
    tracked.wait()
    assert not tracked.is_coming() and torch.equal(x.cpu(), expected)
    tracked.empty()
    assert tracked.is_empty() and tracked.bytes() == 2**24
