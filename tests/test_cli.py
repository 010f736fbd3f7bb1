"""A command prints its result in one line or as JSON, and an error in one line with a code."""

import json
from dataclasses import replace

import fresh
import pytest
import ray
import ray_zerocopy as rzc
import torch
from click.testing import CliRunner
from models import simple
from ray_zerocopy.operate import cli, doctor
from ray_zerocopy.registry import publication
from ray_zerocopy.registry.publication import find


def made():
    """The function of `--make test_cli:made`."""
    torch.manual_seed(0)
    return torch.nn.Linear(256, 256)


@pytest.fixture
def run(cluster, monkeypatch):
    """Run a command in the suite's Ray. Returns its exit code and its output."""

    def run(*words):
        done = CliRunner().invoke(cli.main, words, catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def name():
    yield "cli/model"
    if "cli/model" in rzc.published():
        rzc.retire("cli/model")


def parsed(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_a_retired_base_is_listed_with_its_bytes(run):
    base = rzc.publish("cli/base", made())
    rzc.publish("cli/head", torch.nn.Sequential(made(), torch.nn.Linear(256, 2)), base=base)
    rzc.retire("cli/base")
    (row,) = [row for row in parsed(run("list", "--json")) if row["name"] == "cli/base"]
    assert (row["state"], row["variants"], row["nbytes"]) == ("retired", 1, base.nbytes)
    told = next(line for line in run("list")[1].splitlines() if line.startswith("cli/base"))
    assert "retired, held by 1" in told
    assert "0.3" in told
    rzc.retire("cli/head")
    assert "held by" not in run("list")[1]


def test_a_model_goes_from_make_to_retired(run, name):
    version = parsed(run("publish", name, "--make", "test_cli:made", "--json"))
    assert (version["name"], version["source"], version["heals"]) == (name, "make", True)
    rows = [row for row in parsed(run("list", "--json")) if row["name"] == name]
    assert [(row["number"], row["state"], row["current"]) for row in rows] == [
        (version["number"], "live", True)
    ]
    info = parsed(run("inspect", name, "--verify", "--json"))
    assert info["nbytes"] == version["nbytes"]
    assert len(info["tensors"]) == 2
    nodes = [node["NodeID"] for node in ray.nodes()]
    assert list(parsed(run("prefetch", name, "--json"))) == nodes
    (row,) = [row for row in parsed(run("list", "--json")) if row["name"] == name]
    assert row["nodes"] == nodes
    assert parsed(run("retire", name, "--json")) == {"name": name, "number": None}
    assert name not in rzc.published()


def test_a_version_that_is_being_rebuilt_is_waited_for(run, name, tmp_path, monkeypatch):
    rzc.publish(name, made())
    path = tmp_path / "model.rzc"
    answers = iter([True, True, False])
    rebuilding = replace(rzc.versions(name)[-1], ref=None)
    monkeypatch.setattr(
        publication, "find", lambda *how: rebuilding if next(answers) else find(*how)
    )
    parsed(run("save", name, str(path), "--json"))
    assert torch.equal(rzc.open(path).weight, made().weight)

    monkeypatch.setattr(publication, "find", lambda *_: rebuilding)
    monkeypatch.setattr(cli, "_REBUILT_S", 0.0)
    code, _, told = run("save", name, str(path))
    assert code != 0
    assert "of 'cli/model' has been rebuilding for 0 s: try again" in told
    assert rzc.inspect(path).nbytes > 0


def test_a_snapshot_is_looked_at_without_a_cluster(tmp_path):
    rzc.save(torch.ones(2000), tmp_path / "model.rzc")
    words = ["--address", "127.0.0.1:1", "inspect", str(tmp_path / "model.rzc"), "--verify"]
    done = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "verified: every byte" in done.stdout


def test_a_version_is_promoted_back(run, name):
    first = rzc.publish(name, torch.zeros(2000))
    rzc.publish(name, torch.ones(2000))
    code, out, _ = run("promote", name, str(first.number))
    assert (code, out) == (0, f"{name} version {first.number} is now current\n")
    assert rzc.load(name).sum() == 0


def test_a_snapshot_is_saved_looked_at_and_restored(run, name, tmp_path):
    path = str(tmp_path / "model.rzc")
    model = simple().model
    rzc.publish(name, model)
    assert parsed(run("save", name, path, "--json"))["path"] == path
    code, out, _ = run("inspect", path, "--verify", "--tensors")
    assert code == 0
    assert "float32" in out
    assert "every byte is as it was written" in out
    assert "held" not in out  # a file has no holder
    rzc.retire(name)
    assert parsed(run("restore", path, name, "--json"))["source"] == "path"
    loaded = rzc.load(name)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_what_a_person_reads_fits_in_100_columns(run, name):
    rzc.publish(name, made())
    for words in (["list"], ["inspect", name, "--tensors"], ["doctor"]):
        _, out, _ = run(*words)
        assert out
        assert max(map(len, out.splitlines())) <= 100


def test_what_is_refused_is_one_line_and_exit_code_1(run, tmp_path):
    broken = tmp_path / "broken.rzc"
    broken.write_bytes(b"no snapshot" * 1000)
    for words in (["inspect", "nobody"], ["retire", "nobody"], ["inspect", str(broken)]):
        code, out, err = run(*words)
        assert (code, out) == (1, "")
        assert err.startswith("ray-zerocopy: ")
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(cluster):
    with pytest.raises(rzc.UnknownVersionError):
        CliRunner().invoke(cli.main, ["--debug", "inspect", "nobody"], catch_exceptions=False)


def test_wrong_usage_is_exit_code_2(run):
    assert run("publish", "x")[0] == 2
    assert run("publish", "x", "--make", "no_colon")[0] == 2
    assert run("publish", "x", "--make", "no_such_module:f")[0] == 2
    assert run("publish", "x", "--path", "no_such.rzc")[0] == 2
    assert run("restore", "no_such.rzc", "x")[0] == 2


def test_doctor_ends_with_1_where_something_is_to_mend(run, monkeypatch):
    sound, ill = doctor.Finding("a", True, "b"), doctor.Finding("c", False, "d", "mend it so")
    for findings, expected in (([sound], 0), ([sound, ill], 1)):
        monkeypatch.setattr(doctor, "examine_cluster", lambda found=findings: {"node": found})
        code, out, _ = run("doctor")
        assert code == expected
        assert ("mend it so" in out) == bool(expected)
        code, out, _ = run("doctor", "--json")
        assert (code, len(json.loads(out)["node"])) == (expected, len(findings))


def test_the_doctor_needs_no_cluster():
    @fresh.run
    def alone():
        import json
        import os

        import ray
        from click.testing import CliRunner
        from ray_zerocopy.operate import cli

        del os.environ["RAY_ADDRESS"]
        cli._failure = lambda address: ConnectionError("none")  # other tests have clusters
        done = CliRunner().invoke(cli.main, ["doctor", "--json"], catch_exceptions=False)
        assert done.exit_code in (0, 1), done.stderr
        ((here, findings),) = json.loads(done.stdout).items()
        assert "no cluster is running" in here
        assert {"store", "private pages"} <= {finding["check"] for finding in findings}
        ray.shutdown()


def test_nothing_published_is_said_in_one_line(run, monkeypatch):
    monkeypatch.setattr(cli, "state", lambda: {"names": {}})
    assert run("list") == (0, "no published models\n", "")


def test_a_node_is_named_by_the_start_of_its_id(run, name):
    rzc.publish(name, made())
    (node,) = (node["NodeID"] for node in ray.nodes())
    assert parsed(run("prefetch", name, "--node", node[:8], "--json")) == {node: 0.0}
    code, _, err = run("prefetch", name, "--node", "nobody")
    assert code == 2
    assert node[:12] in err


def test_the_same_bytes_are_not_published_again(run, name):
    number = parsed(run("publish", name, "--make", "test_cli:made", "--json"))["number"]
    code, out, _ = run("publish", name, "--make", "test_cli:made")
    assert (code, out) == (0, f"{name} version {number} is identical: not stored again\n")
    _, out, _ = run("inspect", name)
    told = "current, published by make, heals, on 1 nodes"
    assert out.startswith(f"{name} version {number}, {told}\n")


def test_json_stands_alone_on_standard_output(run, monkeypatch):
    from ray_zerocopy.operate import demo

    def main():
        print("build BERT-base")
        return {"exact": True}

    monkeypatch.setattr(demo, "main", main)
    code, out, err = run("demo", "--json")
    assert (code, json.loads(out)) == (0, {"exact": True})
    assert err == "build BERT-base\n"


def test_what_nobody_foresaw_is_one_line_too(run, monkeypatch):
    def broken():
        raise KeyError("x")

    monkeypatch.setattr(rzc, "retire", lambda *_: broken())
    code, out, err = run("retire", "x")
    assert (code, out) == (1, "")
    assert err == "ray-zerocopy: KeyError: 'x' (--debug shows where)\n"


def test_without_a_cluster_it_says_so_and_ends_with_3():
    from fresh import run as run_fresh

    def scenario():
        from click.testing import CliRunner
        from ray_zerocopy.operate import cli

        done = CliRunner().invoke(cli.main, ["--address", "127.0.0.1:1", "list"])
        assert done.exit_code == 3, done.output
        assert "no Ray cluster at 127.0.0.1:1" in done.stderr

    run_fresh(scenario)
