"""The bench's report: it says what the records say, needs nothing from outside, and does not fall over what was not measured."""

import json
import re

import pytest

from agent.api.records import Phase, StartRecord
from loadgen.bench.figures import MODES, Measured, counted, distribution, summary
from loadgen.bench.report import rows_by_function, usual, write

MS = 1_000_000
T0 = 1_780_000_000_000_000_000
TOTAL_MS = {"thaw": 2, "restore": 10, "remote": 25, "whole": 400, "cold": 800}


def start(mode, number=0, part="modes", function="index"):
    total = TOTAL_MS[mode] * MS + number * 1000
    phases = [Phase("agent.queue", T0, T0 + total // 4), Phase("ready <&>", T0 + total // 4, T0 + total // 2)]
    record = StartRecord(
        command_id=f"{mode}{number}", function=function, start_mode=mode, started_ns=T0, ended_ns=T0 + total, phases=phases
    )
    return Measured(part=part, asked=mode, kind=mode, record=record)


@pytest.fixture
def measured():
    found = [start(mode, number) for mode in MODES for number in range(4)]
    return [*found, *(start("restore", number, "fanout-5") for number in range(5))]


@pytest.fixture
def result(measured):
    modes = [item for item in measured if item.part == "modes"]
    index = {mode: summary(counted(modes, mode)) for mode in MODES}
    index |= {"standby_pss_mb": 4.1, "cold_pss_mb": 550.0, "image_bytes": 540_000_000, "working_set_bytes": 2_300_000}
    index |= {"remote_bytes_before_response": 2_100_000, "bytes_by_tier": {"thaw": {"memory": 2_300_000}}}
    index["other"] = {"thaw": {"restore": 2}}
    index["requests"] = {"thaw": {"asked": 10000, "wrong": 0, "failed": 3, "per_second": 900, "problems": []}}
    fan = {"first_ms": 9.0, "median_ms": 20.0, "last_ms": 31.0, "cpu_ms_each": 11.0, "cpu_ms_one": 10.0}
    fan |= {"last_to_cpu_bound": 1.24, "last_to_cpu_used": 1.13, "background_percent": 3.0, "repeats": 1, "starts": 5, "other": {}}
    idle = {"before": 1.0, "with_standbys": 1.5}
    with_standbys = {"restore": distribution([11.0]), "thaw": distribution([2.0])}
    density = {"standbys": 200, "system_mb": 876.5, "pss_mb": 4.1, "made_seconds": 26.3, "refused": ["no <room>"], "other": {}}
    return {
        "subject": "index",
        "functions": {"index": index},
        "demand_to_response": {"thaw": {**summary(counted(modes, "thaw")), "answer": distribution([3.0])}, "other": {}, "failed": ""},
        "fanout": {"5": fan},
        "density": {**density, "idle_cpu_percent": idle, "with_standbys": with_standbys},
        "wrong": 3,
        "failed": ["echo: no checkpoint of echo: it has <io_uring>"],
        "machine": {"kernel": "6.1 <&>"},
        "command": "thaw bench restore -n 4",
    }


def text_of(tmp_path, result, measured):
    return write(tmp_path / "out", result, measured, T0).read_text()


def test_it_fetches_nothing_and_its_links_are_files_beside_it(tmp_path, result, measured):
    text = text_of(tmp_path, result, measured)
    links = re.findall(r'<a href="([^"]+)"', text)
    assert links
    assert all((tmp_path / "out" / link).is_file() for link in links)
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import", text)
    assert all(target.startswith("#") for target in re.findall(r'(?:src|xlink:href)="([^"]+)"', text))
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_figures_of_one_page_do_not_share_names(tmp_path, result, measured):
    figures = re.findall(r"<svg.*?</svg>", text_of(tmp_path, result, measured), flags=re.DOTALL)
    assert len(figures) == 1 + len(MODES) + 1  # phases, the median start of each mode, fan-out
    defined = [set(re.findall(r'\bid="([^"]+)"', figure)) for figure in figures]
    for figure, own in zip(figures, defined, strict=True):
        assert all(target in own for target in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', figure))


def test_it_says_what_the_records_say(tmp_path, result, measured):
    text = text_of(tmp_path, result, measured)
    assert "p50; cold 800 ms: 400 times as long" in text
    assert "p50; whole image 400 ms: 40 times as long" in text
    assert "876" in text
    assert "index: 2 starts that were to be thaw were restore; they are not counted" in text
    assert "Repeat it with: thaw bench restore -n 4" in text
    assert "3 wrong or missing answers" in text


def test_text_from_outside_is_escaped(tmp_path, result, measured):
    text = text_of(tmp_path, result, measured)
    assert "6.1 &lt;&amp;&gt;" in text
    assert "&lt;io_uring&gt;" in text
    assert "no &lt;room&gt;" in text
    assert "<io_uring>" not in text


def test_the_raw_data_are_all_starts_and_the_result(tmp_path, result, measured):
    text_of(tmp_path, result, measured)
    lines = [json.loads(line) for line in (tmp_path / "out" / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == len(measured)
    assert lines[0]["asked"] == "thaw"
    assert lines[0]["record"]["phases"][0]["name"] == "agent.queue"
    assert json.loads((tmp_path / "out" / "restore.json").read_text()) == result


def test_a_run_that_measured_nothing_has_a_report(tmp_path):
    empty = {"functions": {}, "wrong": 0, "failed": [], "machine": {}, "command": "", "subject": "index"}
    assert "Every start was what it was to be." in text_of(tmp_path, empty, [])


def test_a_mode_without_starts_leaves_gaps_not_zeros(tmp_path, result, measured):
    result["functions"]["index"]["thaw"] = summary([])
    kept = [item for item in measured if item.asked != "thaw"]
    assert rows_by_function(result["functions"])[0][1].keys() == {"restore", "remote", "whole", "cold"}
    assert "The median start: thaw" not in text_of(tmp_path, result, kept)


def test_the_usual_start_adds_up_and_its_phases_are_in_order():
    found = usual([start("restore", number).record for number in range(4)])
    assert list(found) == ["agent.queue", "ready <&>", "unaccounted"]
    assert sum(found.values()) == pytest.approx(10, abs=0.01)
    assert usual([]) == {}
