"""The report of the levels: which record counts, what a cell says, and pictures that can be drawn from any records."""

import re

import pytest
from page import Page

from benchmarks import levels, plots, records, report

CPU, GPU = "CPU, 2 threads, AVX512", "NVIDIA H100 80GB HBM3"


def record(peer, num_tokens, seconds, **fields):
    """One line as `compare` writes it: a frozen head whose floor is 20 microseconds per token."""
    floor = 2e-5 * num_tokens
    return {
        "level": "head",
        "task": "frozen",
        "shape": {"name": "Llama-3-8B/8", "num_tokens": num_tokens, "hidden_size": 512, "vocab_size": 16032},
        "dtype": "float32",
        "peer": peer,
        "peer_version": "1.2",
        "mean_only": False,
        "floor_s": floor,
        "copy_bytes_per_s": 2e10,
        "gemm_flop_per_s": 3e11,
        "device": CPU,
        "versions": {"torch": "2.13.0", "triton": "3.7.1"},
        "commit": "abc1234",
        "time": "2026-11-23T16:00:00Z",
        "errors": {"logp_nats": 4e-6, "grad": 1e-6, "grad_worst_row": 3e-6},
        "peak_bytes": num_tokens * 2**14,
        "median_s": seconds,
        "p20_s": seconds * 0.9,
        "p80_s": seconds * 1.1,
        "rounds": 5,
        "of_floor": floor / seconds,
    } | fields


def without_time(peer, num_tokens, **why):
    whole = record(peer, num_tokens, 1.0)
    gone = ("median_s", "p20_s", "p80_s", "rounds", "of_floor", "peak_bytes", "errors")
    return {key: value for key, value in whole.items() if key not in gone} | why


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(records): they are all that the report knows."""
    monkeypatch.setattr(records, "LEVELS", tmp_path / "levels.jsonl")

    def append(*lines):
        for line in lines:
            records.append(records.LEVELS, line)

    return append


def sweep(device=CPU):
    lines = []
    for num_tokens in (512, 1024, 2048):
        lines.append(record("dpop-kernels", num_tokens, 2.5e-5 * num_tokens, device=device))
        lines.append(record("PyTorch", num_tokens, 5e-5 * num_tokens, device=device))
    return lines


def test_without_records_the_page_says_so(write):
    assert levels.all_levels() == report.pictures() == levels.NOT_YET
    assert levels.headline() == ""
    assert levels.device_of_levels() is None
    with pytest.raises(ValueError, match=r"precision: expected records of the head, found none\. Run make bench"):
        plots.precision()


def test_the_last_record_counts(write):
    write(record("dpop-kernels", 512, 9.0), record("dpop-kernels", 512, 0.02))
    ((group, peers),) = levels.latest().items()
    assert group == (CPU, "head", "frozen", "Llama-3-8B/8, 512 tokens, float32")
    assert peers["dpop-kernels"]["median_s"] == 0.02


def test_a_rehearsal_is_no_measurement(write):
    write(record("dpop-kernels", 512, 9.0, device=f"{CPU}, interpreted"))
    assert levels.latest() == {}


def test_a_table_by_hand(write):
    """20 ms of 10.24 ms of floor is 51 %; 512 tokens of 16 KiB are 8 MiB; PyTorch takes 1.5 times as long."""
    write(record("dpop-kernels", 512, 0.020), record("PyTorch", 512, 0.030))
    write(without_time("Liger", 512, skipped="needs CUDA"), without_time("TRL", 512, refused="wrong result"))
    ((_, peers),) = levels.latest().items()
    lines = levels.peer_table(peers).splitlines()
    assert lines[2] == "| dpop-kernels 1.2 | **20** (18 … 22) | 1.00 × | 51% | 8 MiB | 4e-06 | 1e-06 | 3e-06 |"
    assert lines[3].startswith("| PyTorch 1.2 | **30** (27 … 33) | 1.50 × | 34% |")
    assert lines[-1] == "Without a time: Liger: needs CUDA; TRL: wrong result."


def test_mean_only_peers_are_marked(write):
    write(record("dpop-kernels", 512, 0.02), record("FLA", 512, 0.01, mean_only=True))
    assert "| FLA 1.2 (mean only) |" in levels.all_levels()


def test_a_gpu_comes_before_a_cpu(write):
    write(*sweep(), *sweep(GPU))
    page = levels.all_levels()
    assert page.index(f"## {GPU}") < page.index(f"## {CPU}")
    assert "floors 20 … 20 GB/s copied, 300 … 300 GFLOP/s multiplied; commit abc1234; 2026-11-23." in page
    assert levels.device_of_levels() == GPU
    assert GPU in levels.headline()
    assert levels.most_tokens() == {"Llama-3-8B/8": 2048}


def test_the_headline_is_the_middle_of_the_sweep(write):
    write(*sweep())
    assert "Llama-3-8B/8, 2048 tokens, float32" in levels.headline()
    assert "| dpop-kernels 1.2 | **51.2** | 80% | 32 MiB | 4e-06 | 3e-06 |" in levels.headline()


def test_sizes_tell_cases_apart():
    pairs = {"name": "Llama-3-8B", "pairs": "MetaMath-like", "num_pairs": 4, "num_tokens": 99}
    assert levels.size_of({"shape": pairs, "dtype": "bfloat16"}) == "Llama-3-8B, 4 MetaMath-like pairs, bfloat16"
    alone = {"name": "UltraFeedback-like", "num_pairs": 64, "num_tokens": 9}
    assert levels.size_of({"shape": alone, "dtype": "float32"}) == "64 UltraFeedback-like pairs, float32"


@pytest.mark.parametrize("lonely", [False, True])
def test_pictures_are_drawn_with_and_without_gaps(write, lonely):
    """A peer that ran out of memory at one size, another model, an error of exactly zero; and ours alone."""
    write(*sweep()[:: 2 if lonely else 1])
    if not lonely:
        write(without_time("PyTorch", 2048, failed="out of memory"))
        other = {"name": "Gemma-2-9B/8", "num_tokens": 1024, "hidden_size": 448, "vocab_size": 32000}
        write(record("dpop-kernels", 1024, 0.1, shape=other, errors={"logp_nats": 0.0, "grad_worst_row": 0.0}))
    panels = [*plots.against_tokens(), *plots.precision()]
    assert [panel.name for panel in panels] == [
        "head_time", "head_memory", "head_floors", "precision_logp_nats", "precision_grad_worst_row",
    ]  # fmt: skip
    for panel in panels:
        assert "dpop-kernels" in Page(panel.svg).text
        assert "nan" not in panel.svg


def test_every_model_has_a_longest_pair(write):
    lines = report.longest().splitlines()
    assert len(lines) == 2 + len(report.KNOWN)
    assert "| Llama-3-8B | 8.03 billion |" in report.longest()
    # 72 billion weights in bf16 are 145 GB
    assert "| Qwen2.5-72B | 72.71 billion | – | – |" in report.longest()


def test_negative_numbers_of_pages_have_a_minus_sign():
    for page in (report.ROOT / "README.md", *(report.ROOT / "docs").glob("*.md")):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # but for code
        assert not re.findall(r"^.*(?:^|[ |*(])-[0-9].*$", prose, flags=re.MULTILINE), page.name
