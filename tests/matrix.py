"""Runs the suite on common pairs of torch and Ray; writes docs/reference/compatibility.md.

    python tests/matrix.py WHEEL [TORCH/RAY ...]

Each pair gets a new virtual environment: torch and Ray first, then the wheel, which must not change
them, then the tests that need nothing else. The environment is removed afterwards. A run with some
pairs keeps the rows of the others.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from ray_zerocopy import requirements

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/reference/compatibility.md"
PAIRS = (  # Python, torch, Ray, and other requirements
    ("3.11", "2.6", "2.43", "numpy<2"),
    ("3.11", "2.8", "2.48"),
    ("3.11", "2.10", "2.52"),
    ("3.12", "2.12", "2.55"),
    ("3.13", "2.15", "2.60"),
)
TOOLS = ("grpcio", "mypy", "pytest", "pytest-xdist", "psutil", "safetensors")
NEED_MORE = "not hf and not bert and not transformers and not faces"
FILES = (
    *("core", "files", "inside", "invoke", "isolation", "memory_footprint", "pages"),
    *(
        "put",
        "registry",
        "ray_inside",
        "requirements",
        "rewrite",
        "snapshot",
        "store",
        "torchscript",
        "views",
    ),
    "wrappers",
)
WHY = {  # reasons for tests that fail because torch or Ray differ; others show their message
    "test_a_program_loads_as_it_was_put": "torch's own archive gives nodes other names",
    "test_its_weights_and_those_of_its_module_are_views_on_the_block": "torch 2.6 exports "
    "nothing without example inputs",
    "test_ray_client_is_told_what_to_do_instead": "Ray's own client does not connect beside "
    "today's grpcio and protobuf",
}
HEADS = ("Python", "torch", "Ray", "numpy", "views", "put", "passed", "failed", "which, and why")
TELL = """
import platform, numpy, ray, torch
from ray_zerocopy.store.description import ways
print(platform.python_version(), torch.__version__.split("+")[0], ray.__version__)
print(numpy.__version__, ways()["views"], ways()["put"])
"""


def tried(wheel, python, torch, ray, *others):
    """A row of the table: versions, code paths in use, tests passed and failed."""
    with tempfile.TemporaryDirectory(prefix="rzc-matrix-") as folder:
        told(f"python{python}", "-m", "venv", folder)
        python = f"{folder}/bin/python"
        pip = (python, "-m", "pip")
        told(*pip, "install", "-q", f"torch=={torch}.*", f"ray=={ray}.*", "numpy", *others)
        installed = set(told(*pip, "freeze").splitlines())
        told(*pip, "install", "-q", *TOOLS, wheel)
        if changed := installed - set(told(*pip, "freeze").splitlines()):
            raise SystemExit(f"with the wheel came other versions of {changed}")
        ways = told(python, "-W", "ignore", "-c", TELL, cwd=folder).split()
        publishes = requirements.numbers(ray) >= requirements.numbers(
            requirements.PUBLISHING["ray"]
        )
        names = [name for name in FILES if name != "registry" or publishes]
        passed, failed, notes = results(python, names, Path(folder, "junit.xml"))
        if not publishes:
            notes.append(f"no published models before Ray {requirements.PUBLISHING['ray']}")
        return [*ways, str(passed), str(failed), "<br>".join(notes)]


def results(python, names, report):
    """The numbers of tests that passed and failed, and the messages of failures."""
    files = [f"{TESTS}/test_{name}.py" for name in names]
    how = ["-n2", "--dist=loadfile", "-q", "-k", NEED_MORE, f"--junitxml={report}"]
    subprocess.run([python, "-m", "pytest", *files, *how], cwd=TESTS.parent, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    return passed, len(failed), reasons(failed)


def reasons(failed):
    """A line for each test that failed: why, or the first message of its cases."""
    messages = defaultdict(list)
    for case in failed:
        message = " ".join(next(iter(case)).get("message", "").split()).replace("|", "/")
        messages[case.get("name").partition("[")[0]].append(message[:100])
    return [f"{len(each)} of `{name}`: {WHY.get(name, each[0])}" for name, each in messages.items()]


def told(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def write(row):
    """Put a row into the table between the page's two marks, in the order of versions."""
    marks = r"(?<=<!-- matrix -->\n)(.*)(?=<!-- /matrix -->)"
    before, old, after = re.split(marks, PAGE.read_text(), flags=re.S)
    kept = ([cell.strip() for cell in line[1:-1].split("|")] for line in old.splitlines()[2:])
    rows = {minors(cells): cells for cells in (*kept, row)}
    lines = [HEADS, ["--"] * len(HEADS), *(rows[key] for key in sorted(rows))]
    PAGE.write_text(before + "".join(f"| {' | '.join(line)} |\n" for line in lines) + after)


def minors(cells):
    """The torch, Ray and Python that identify a row, without patch versions."""
    python, *packages = (tuple(map(int, cell.split(".")[:2])) for cell in cells[:3])
    return *packages, python


def main(wheel, *asked):
    for python, torch, ray, *others in PAIRS:
        if not asked or f"{torch}/{ray}" in asked:
            write(tried(wheel, python, torch, ray, *others))


if __name__ == "__main__":
    main(*sys.argv[1:])
