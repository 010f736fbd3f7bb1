"""The doctor finds and names every planted defect, with a fix."""

import shutil

import pytest
import ray
from ray_zerocopy.operate import doctor


def bad(findings):
    return {finding.check: finding for finding in findings if not finding.good}


def test_every_finding_tells_what_was_found_and_only_defects_how_to_mend_them(cluster):
    findings = doctor.examine()
    assert {"versions", "huge pages", "/dev/shm", "private pages", "store"} <= {
        finding.check for finding in findings
    }
    for finding in findings:
        assert finding.found
        assert bool(finding.mend) != finding.good, finding


def test_a_task_examines_every_node(cluster):
    found = doctor.examine_cluster()
    assert len(found) == len(ray.nodes())
    assert all(len(findings) > 8 for findings in found.values())


def test_another_torch_than_was_tried_is_named(cluster, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "9.9.0" if name == "torch" else "2.0.0")
    (finding,) = doctor._versions()
    assert not finding.good
    assert "torch 9.9.0" in finding.mend


def test_a_dev_shm_smaller_than_the_store_is_named(cluster, monkeypatch):
    usage = shutil.disk_usage("/")._replace(total=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (finding,) = doctor._shm()
    assert not finding.good
    assert "remount,size=700000000" in finding.mend


def test_niceness_and_a_limit_of_the_address_space_are_named(cluster):
    @ray.remote(num_cpus=0, max_calls=1)
    def limited():
        import os
        import resource

        os.nice(5)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.RLIM_INFINITY))
        return [*doctor._niceness(), *doctor._limits()]

    found = bad(ray.get(limited.remote()))
    assert set(found) == {"niceness", "address space"}
    assert "RAY_worker_niceness=0" in found["niceness"].mend


def test_huge_pages_that_the_kernel_refuses_are_named(cluster):
    @ray.remote(num_cpus=0, max_calls=1)
    def refused():
        import ctypes

        assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
        return list(doctor._huge_pages())

    (finding,) = ray.get(refused.remote())
    assert not finding.good
    assert finding.found


def test_a_node_that_does_not_answer_is_told(cluster):
    @ray.remote(num_cpus=99)
    def never():
        return []

    (finding,) = doctor._answer(never.remote(), timeout=1.0)
    assert (finding.check, finding.good) == ("answer", False)


def test_a_node_that_fails_is_told(cluster):
    @ray.remote(num_cpus=0, max_retries=0)
    def broken():
        raise ImportError("No module named 'ray_zerocopy'")

    ref = broken.remote()
    ray.wait([ref])
    with pytest.raises(ImportError):
        ray.get(ref)
    (finding,) = doctor._answer(ref, timeout=1.0)
    assert "No module named" in finding.found
