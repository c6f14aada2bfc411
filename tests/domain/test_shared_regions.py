"""What a region must be, what its owner can no longer do to it, and how much there may be of it."""

import fcntl
import os
import socket
import threading

import numpy as np
import pytest

from lossd.shared_memory import Answer
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.shared_memory import Regions, regions
from lossd_server.shared_memory.mapping import RefusedError
from lossd_server.shared_memory.regions import Owner
from tests.domain.regions import PAGE, SEALED, bytes_of, mapping_count, memory_file, memory_file_count

MANY = 1 << 30


def make_regions(max_bytes=MANY, max_total_bytes=MANY):
    return Regions(max_bytes=max_bytes, max_total_bytes=max_total_bytes)


def refusal(held, descriptor, size=PAGE, owner=None):
    with pytest.raises(RefusedError) as caught:
        held.add(owner or Owner(), descriptor, size)
    return caught.value


def test_both_sides_see_the_same_memory():
    held = make_regions()
    with memory_file() as descriptor:
        theirs = bytes_of(descriptor)
        region_id = held.add(Owner(), descriptor, PAGE)
    ours = np.frombuffer(held.find(region_id), np.uint8)
    theirs[17], ours[18] = 170, 180
    assert (ours[17], theirs[18]) == (170, 180)


def test_ids_are_long_and_never_alike():
    held = make_regions()
    with memory_file() as descriptor:
        ids = [held.add(Owner(), descriptor, PAGE) for _ in range(50)]
    assert len(set(ids)) == 50
    assert {len(region_id) for region_id in ids} == {16}


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_a_file_whose_size_is_not_fixed_is_refused(seals):
    with memory_file(seals=seals) as descriptor:
        assert refusal(make_regions(), descriptor).answer is Answer.NOT_SEALED


def test_what_is_no_memory_file_is_refused(tmp_path):
    held = make_regions()
    (tmp_path / "file").write_bytes(bytes(PAGE))
    with (tmp_path / "file").open("r+b") as file:
        assert refusal(held, file.fileno()).answer is Answer.NOT_SEALED
    with socket.socket() as peer:
        assert refusal(held, peer.fileno()).answer is Answer.NOT_SEALED
    for path, flags in ((tmp_path, os.O_RDONLY), ("/dev/zero", os.O_RDWR), (tmp_path / "file", os.O_PATH)):
        descriptor = os.open(path, flags)
        assert refusal(held, descriptor).answer is Answer.NOT_SEALED
        os.close(descriptor)


@pytest.mark.parametrize("claimed", [PAGE - 1, PAGE + 1, 2 * PAGE, 0, -PAGE, 2**63 - 1, -(2**63)])
def test_a_size_that_is_not_the_files_is_refused(claimed):
    with memory_file() as descriptor:
        assert refusal(make_regions(), descriptor, claimed).answer is Answer.WRONG_SIZE


def test_an_empty_file_is_refused():
    with memory_file(size=0) as descriptor:
        assert refusal(make_regions(), descriptor, 0).answer is Answer.WRONG_SIZE


def test_a_file_that_cannot_be_written_to_is_refused():
    with memory_file(seals=SEALED | fcntl.F_SEAL_WRITE) as descriptor:
        assert refusal(make_regions(), descriptor).answer is Answer.NOT_MAPPABLE
    with memory_file() as descriptor:
        reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        assert refusal(make_regions(), reading).answer is Answer.NOT_MAPPABLE
        os.close(reading)


def test_huge_pages_are_refused():
    with memory_file(size=1 << 21, flags=os.MFD_HUGETLB) as descriptor:
        assert refusal(make_regions(), descriptor, 1 << 21).answer is Answer.NOT_MAPPABLE


def test_nothing_is_left_of_what_was_refused():
    held, files = make_regions(max_bytes=PAGE), memory_file_count()
    for seals, claimed in ((0, PAGE), (SEALED, 7), (SEALED | fcntl.F_SEAL_WRITE, PAGE)):
        with memory_file(seals=seals) as descriptor:
            refusal(held, descriptor, claimed)
    with memory_file(size=2 * PAGE) as descriptor:
        refusal(held, descriptor, 2 * PAGE)
    assert (held.held_bytes, held.count, memory_file_count(), mapping_count()) == (0, 0, files, 0)


def test_the_owner_can_no_longer_cut_it_off():
    held = make_regions()
    with memory_file() as descriptor:
        region_id = held.add(Owner(), descriptor, PAGE)
        for size in (0, PAGE - 1, PAGE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        array = np.frombuffer(held.find(region_id), np.uint8)
        os.posix_fallocate(descriptor, 0, PAGE)
        assert not array.any()


def test_released_memory_lives_as_long_as_an_array_of_it():
    held, owner = make_regions(), Owner()
    with memory_file() as descriptor:
        region_id = held.add(owner, descriptor, PAGE)
    array = np.frombuffer(held.find(region_id), np.uint8)[:5].view(np.int8)
    held.release(owner, region_id)
    array[:] = 3
    assert (array.sum(), held.held_bytes, mapping_count()) == (15, PAGE, 1)
    del array
    assert (mapping_count(), held.held_bytes) == (0, 0)


def test_a_released_region_is_unknown_to_all():
    held, owner = make_regions(), Owner()
    with memory_file() as descriptor:
        region_id = held.add(owner, descriptor, PAGE)
    held.release(owner, region_id)
    with pytest.raises(InvalidInputError) as caught:
        held.find(region_id)
    assert caught.value.reason is Reason.UNKNOWN_REGION
    assert region_id.hex() not in repr((caught.value, caught.value.values))
    with pytest.raises(RefusedError) as refused:
        held.release(owner, region_id)
    assert refused.value.answer is Answer.UNKNOWN_REGION


def test_only_the_owner_releases():
    held, owner = make_regions(), Owner()
    with memory_file() as descriptor:
        region_id = held.add(owner, descriptor, PAGE)
    with pytest.raises(RefusedError):
        held.release(Owner(), region_id)
    assert len(held.find(region_id)) == PAGE


def test_an_owner_that_goes_takes_its_regions_and_no_others():
    held, owner = make_regions(), Owner()
    with memory_file() as descriptor:
        gone = [held.add(owner, descriptor, PAGE) for _ in range(3)]
        stays = held.add(Owner(), descriptor, PAGE)
    held.release_all(owner)
    for region_id in gone:
        with pytest.raises(InvalidInputError):
            held.find(region_id)
    assert len(held.find(stays)) == PAGE
    assert (held.held_bytes, owner.ids) == (PAGE, set())


def test_the_limits_are_of_one_owner_and_of_all():
    held, one, other = make_regions(2 * PAGE, 3 * PAGE), Owner(), Owner()
    with memory_file() as descriptor:
        ids = [held.add(one, descriptor, PAGE) for _ in range(2)]
        refused = refusal(held, descriptor, owner=one)
        assert (refused.answer, refused.limit) == (Answer.TOO_LARGE, 2 * PAGE)
        held.add(other, descriptor, PAGE)
        refused = refusal(held, descriptor, owner=other)
        assert (refused.answer, refused.limit) == (Answer.FULL, 3 * PAGE)
        held.release(one, ids[0])
        held.add(other, descriptor, PAGE)


def test_what_is_still_computed_with_counts():
    held, owner = make_regions(PAGE), Owner()
    with memory_file() as descriptor:
        region_id = held.add(owner, descriptor, PAGE)
        array = np.frombuffer(held.find(region_id), np.uint8)
        held.release(owner, region_id)
        assert refusal(held, descriptor, owner=owner).answer is Answer.TOO_LARGE
        del array
        held.add(owner, descriptor, PAGE)


def test_regions_are_counted(monkeypatch):
    monkeypatch.setattr(regions, "MAX_REGIONS", 5)
    monkeypatch.setattr(regions, "MAX_REGIONS_EACH", 3)
    held, owner = make_regions(), Owner()
    with memory_file() as descriptor:
        for _ in range(3):
            held.add(owner, descriptor, PAGE)
        assert refusal(held, descriptor, owner=owner).answer is Answer.TOO_MANY_REGIONS
        for _ in range(2):
            held.add(Owner(), descriptor, PAGE)
        assert refusal(held, descriptor).answer is Answer.TOO_MANY_REGIONS


def test_threads_that_come_and_go_leave_the_accounts_straight():
    held = make_regions()

    def come_and_go():
        owner = Owner()
        with memory_file() as descriptor:
            for _ in range(100):
                region_id = held.add(owner, descriptor, PAGE)
                array = np.frombuffer(held.find(region_id), np.uint8)
                held.release(owner, region_id)
                del array

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (held.held_bytes, held.count, mapping_count()) == (0, 0, 0)
