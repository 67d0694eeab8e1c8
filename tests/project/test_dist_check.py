"""`make dist-check` knows how to try every command and every Python block of README.md: told here, in a moment."""

from pathlib import Path

import pytest
from dist_check import (
    COMMANDS,
    HUB_MODELS,
    PREAMBLES,
    blocks,
    needed,
    needs,
    plain,
    preamble_of,
    run,
    shell_commands,
    trial_of,
)

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_command_of_the_readme_is_tried_or_says_why_not():
    used = [trial_of(command) for command in shell_commands(README)]
    assert len(used) >= 6
    assert [start for start, trial in COMMANDS.items() if not any(trial is one for one in used)] == []  # none is stale


def test_every_python_block_of_the_readme_is_run():
    assert {preamble_of(block) for block in blocks(README, "python")} == PREAMBLES.keys()


def test_every_stand_in_is_named_by_the_readme():
    assert all(model in README for model in HUB_MODELS)


def test_commands_as_a_shell_reads_them():
    text = "```sh\nmake demo    # a word\n\ndpop train --a 'b c' \\\n    --d\n```\n"
    text += "```python\nx = 1\n```\n```sh\n# none\nls\n```\n"
    assert shell_commands(text) == [["make", "demo"], ["dpop", "train", "--a", "b c", "--d"], ["ls"]]
    assert blocks(text, "python") == ["x = 1\n"]


def test_what_nothing_covers_fails():
    with pytest.raises(SystemExit, match=r"`dpop pairs` fits no line of dist_check\.COMMANDS"):
        trial_of(["dpop", "pairs"])
    with pytest.raises(SystemExit, match=r"no phrase of dist_check\.PREAMBLES is in this block"):
        preamble_of("print(1)")


def test_a_failed_command_ends_the_check(tmp_path, capsys):
    assert run(["echo", "a"], cwd=tmp_path) == "a\n"
    assert run(["sh", "-c", "exit 3"], cwd=tmp_path, exit_codes=(0, 3)) == ""
    with pytest.raises(SystemExit, match=r"dist-check: `sh -c .*`: expected exit code \(0,\), got 3"):
        run(["sh", "-c", "echo why >&2; exit 3"], cwd=tmp_path)
    assert "why" in capsys.readouterr().err


def test_distributions_go_by_one_spelling():
    assert plain("Typing_extensions") == plain("typing.extensions") == "typing-extensions"


def test_what_is_needed_follows_the_extras_that_are_asked_for_and_no_others():
    found = {
        "ours": ["torch>=2.8", "triton>=3.4; sys_platform == 'linux'", "yaml>=6; extra == 'trainer'"],
        "torch": ["Cuda_Toolkit[cublas, nvrtc]==13; platform_system == 'Linux'", 'numpy>1; extra == "all"'],
        "cuda-toolkit": ["nvidia-cublas==13.*; extra == 'cublas'", "nvidia-npp==13.*; extra == 'npp'"],
        "yaml": ["numpy"],
    }
    assert {name for name, _ in needs(found["ours"])} == {"torch", "triton"}
    assert needed(found, "ours") == {"ours", "torch", "triton", "cuda-toolkit", "nvidia-cublas"}
