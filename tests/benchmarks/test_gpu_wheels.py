"""The wheels for a machine without a network: what is asked of pip, what is left out of a wheel, what it comes to."""

import zipfile

import pytest

from benchmarks.gpu import wheels
from benchmarks.gpu.wheels import Wheel


def write(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def test_a_wheel_without_what_the_machine_does_not_need(tmp_path):
    listed = "pkg/__init__.py,sha256=a,1\npkg/lib_cuda12.so,sha256=b,9\npkg/lib_cuda13.so,sha256=c,9\nRECORD,,\n"
    files = {
        "pkg/__init__.py": "",
        "pkg/lib_cuda12.so": "x" * 99,
        "pkg/lib_cuda13.so": "y",
        "pkg-1.dist-info/RECORD": listed,
    }
    path = wheels.trimmed(write(tmp_path / "pkg-1-py3-none-any.whl", files), ("pkg/lib_cuda12",))
    with zipfile.ZipFile(path) as wheel:
        assert wheel.namelist() == ["pkg/__init__.py", "pkg/lib_cuda13.so", "pkg-1.dist-info/RECORD"]
        assert wheel.read("pkg-1.dist-info/RECORD").decode() == listed.replace("pkg/lib_cuda12.so,sha256=b,9\n", "")
        assert wheel.read("pkg/lib_cuda13.so") == b"y"
    assert wheels.trimmed(path, ("pkg/lib_cuda12",)) == path  # a second time there is nothing to leave out


def test_pip_is_asked_for_the_machines_platform(tmp_path):
    command = wheels.download_command(Wheel("some-package", "1.2", ""), tmp_path)
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "some-package==1.2"
    assert "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "--platform=manylinux_2_28_x86_64" in command


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two wheels that are there already; the checkout is of 3 MiB."""
    monkeypatch.setattr(wheels, "tracked_mib", lambda: 3.0)
    monkeypatch.setattr(wheels, "WHEELS", (Wheel("one-a", "1", "a peer"), Wheel("two", "2", "both")))
    write(tmp_path / "one_a-1-py3-none-any.whl", {"one.so": bytes(2 << 20)})
    write(tmp_path / "two-2-py3-none-any.whl", {"two.so": bytes(1 << 20)})
    return tmp_path


def test_the_sum_is_held_to_what_may_travel(few, monkeypatch, capsys):
    assert wheels.main([str(few)]) == 0
    printed = capsys.readouterr().out
    assert "  2.00 MiB  one_a-1-py3-none-any.whl: a peer" in printed
    assert "  6.00 MiB  of 64" in printed
    assert f"--target /tmp/site {few}/*.whl" in printed
    monkeypatch.setattr(wheels, "LIMIT_MIB", 6.0)
    assert wheels.main([str(few)]) == 1
