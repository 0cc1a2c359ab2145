"""The report: it needs nothing from outside, says what the data say, and does not fall over odd runs."""

import json
import re
from html.parser import HTMLParser

import pytest

from agent.api.records import Phase, StartRecord
from loadgen import machine, report
from loadgen.page import table
from loadgen.report import REPORT_FILE, RunData, unaccounted_share, write
from loadgen.result import RequestRecord, collect, read_requests

T0 = 1_780_000_000_000_000_000
MS = 1_000_000


def start_record(number, mode, total_ms, function="index", **fields):
    began = T0 + number * 1000 * MS
    steps = ["demand", "receive", "sandbox", "ready"] if mode == "cold" else ["demand", "receive", "criu.restore", "resume", "ready"]
    length = int(total_ms * MS / len(steps) * 0.98)
    phases = [Phase(name, began + i * length, began + (i + 1) * length) for i, name in enumerate(steps)]
    return StartRecord(
        command_id=f"{mode}-{number}",
        function=function,
        start_mode=mode,
        started_ns=began,
        ended_ns=began + int(total_ms * MS),
        phases=phases,
        bytes_by_tier={"disk": 1234},
        pages_prefetched=560,
        traceparent="00-" + f"{number:032x}" + "-0000000000000001-01",
        **fields,
    )


def request(number, mode, ms, function="index", **fields):
    began = T0 + number * 1000 * MS
    return RequestRecord(
        number=number,
        function=function,
        row=1,
        intended_ns=began,
        sent_ns=began,
        response_ns=began + int(ms * MS),
        mode=mode,
        instance=f"i{number}",
        outcome="ok",
        token="one" if mode != "cold" else f"t{number}",
        **fields,
    )


def run_data(name, title, mode, milliseconds, **fields):
    starts = [start_record(n, mode, ms) for n, ms in enumerate(milliseconds)]
    requests = [request(n, mode, ms + 1) for n, ms in enumerate(milliseconds)]
    memory = {"instances": [(0.0, 10.0), (1.0, 20.0)], "agent": []}
    return RunData(name, title, collect(requests), starts, memory, **fields)


@pytest.fixture
def product():
    return run_data("restored", "with <checkpoints>", "restore", [10, 12, 14, 16, 40])


@pytest.fixture
def baseline():
    return run_data("cold", "with checkpoints off", "cold", [800, 900, 1000])


def written(tmp_path, product, baseline, **fields):
    path = write(
        tmp_path / "out",
        product,
        baseline,
        machine={"kernel": "6.1 <&>"},
        method=["Open loop & so on."],
        **fields,
    )
    return path, path.read_text()


class Loads(HTMLParser):
    """Collects what a browser would fetch, and checks that every element is closed."""

    VOID = ("meta", "br", "path", "use", "rect", "line", "circle")

    def __init__(self):
        super().__init__()
        self.fetched = []
        self.links = []
        self.ids = []
        self.open = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given[name] for name in ("src", "data", "xlink:href", "srcset", "poster") if name in given]
        if tag == "a":
            self.links.append(given["href"])
        elif "href" in given:
            self.fetched.append(given["href"])
        assert tag not in ("script", "link", "iframe", "object", "embed", "image", "foreignobject"), tag
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_fetches_nothing_and_its_links_are_files_beside_it(tmp_path, product, baseline):
    path, text = written(tmp_path, product, baseline)
    page = Loads()
    page.feed(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.fetched)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))
    assert page.links
    assert all((path.parent / link).is_file() for link in page.links)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of vocabularies


def test_every_reference_inside_a_figure_leads_to_that_figure(tmp_path, product, baseline):
    _, text = written(tmp_path, product, baseline)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 6
    defined = [set(re.findall(r'\bid="([^"]+)"', figure)) for figure in figures]
    for figure, own in zip(figures, defined, strict=True):
        for target in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', figure):
            assert target in own
            assert sum(target in ids for ids in defined) == 1, target


def test_the_headline_is_what_the_records_say(tmp_path, product, baseline):
    _, text = written(tmp_path, product, baseline)
    assert "5 of 5" in text
    assert "60x" in text  # 901 / 15
    assert "15.0 ms instead of 901" in text
    assert "5 restore; 2.0% of a start" in text


def test_text_from_outside_is_escaped(tmp_path, product, baseline):
    _, text = written(tmp_path, product, baseline, title="<script>alert(1)</script>")
    assert "<script>" not in text
    assert "with <checkpoints>" not in text
    assert "with &lt;checkpoints&gt;" in text
    assert "6.1 &lt;&amp;&gt;" in text
    assert "Open loop &amp; so on." in text


def test_the_raw_data_are_those_of_the_runs(tmp_path, product, baseline):
    spans = tmp_path / "scaler.jsonl"
    spans.write_text("{}\n")
    product = RunData(product.name, product.title, product.result, product.starts, product.memory, [spans])
    path, _ = written(tmp_path, product, baseline)
    out = path.parent
    assert read_requests(out / "requests-restored.jsonl") == product.result.records
    starts = [json.loads(line) for line in (out / "starts-cold.jsonl").read_text().splitlines()]
    assert [item["start_mode"] for item in starts] == ["cold"] * 3
    assert json.loads((out / "result-cold.json").read_text())["answered"] == 3
    assert json.loads((out / "machine.json").read_text()) == {"kernel": "6.1 <&>"}
    assert json.loads((out / "memory.json").read_text())["restored"]["instances"] == [[0.0, 10.0], [1.0, 20.0]]
    assert (out / "spans-restored-scaler.jsonl").read_text() == "{}\n"
    assert {item.name for item in out.iterdir()} >= {REPORT_FILE, "requests-cold.jsonl", "starts-restored.jsonl"}


def test_the_median_and_the_slowest_restored_start_are_drawn(tmp_path, product, baseline):
    _, text = written(tmp_path, product, baseline)
    assert "index, restore, 14.0 ms." in text
    assert "index, restore, 40.0 ms." in text
    assert f"Trace {4:032x}." in text


def test_a_cold_fallback_counts_as_a_start_but_not_as_a_restored_one(tmp_path, baseline):
    mixed = [start_record(0, "restore", 10), start_record(1, "cold", 700, fallback_reason="criu: broken"), start_record(2, "restore", 12)]
    failed = start_record(3, "restore", 5, outcome="not_ready")
    requests = [request(0, "restore", 11), request(1, "cold", 701), request(2, "restore", 13)]
    product = RunData("restored", "with checkpoints", collect(requests), [*mixed, failed])
    _, text = written(tmp_path, product, baseline)
    assert "2 restore, 1 cold" in text
    assert report.restored_starts(product)[-1].total_ns == 12 * MS
    assert len(report.restored(product)) == 2


def test_phases_are_in_their_order_whatever_mode_has_them():
    restore, cold = start_record(0, "restore", 10), start_record(1, "cold", 900)
    names = ["demand", "receive", "criu.restore", "resume", "sandbox", "ready"]
    assert sorted(report._in_order([restore, cold])) == sorted(names)
    order = report._in_order([restore, cold])
    for steps in (["demand", "receive", "criu.restore", "resume", "ready"], ["demand", "receive", "sandbox", "ready"]):
        assert [name for name in order if name in steps] == steps


@pytest.mark.parametrize("requests", [[], [request(0, "warm", 1)]])
def test_runs_without_any_start_have_a_report(tmp_path, requests):
    empty = [RunData(name, name, collect(requests)) for name in ("restored", "cold")]
    _, text = written(tmp_path, *empty)
    assert "No start of this run was restored" in text


def test_unaccounted_share_is_the_median():
    starts = [start_record(n, "restore", ms) for n, ms in enumerate([10, 20, 30])]
    assert unaccounted_share(starts) == pytest.approx(0.02, abs=0.001)
    assert unaccounted_share([]) == 0


def test_columns_of_figures_are_aligned_to_the_right_and_others_are_not():
    text = table(["name", "ms", "mixed"], [["a", "1,234.5", "x"], ["b", "", "2"]])
    assert text.count('class="figure"') == 3
    assert '<td class="figure">1,234.5</td>' in text


def test_the_machine_says_what_it_is():
    facts = machine.facts({"CRIU": "4.2.1"})
    assert facts["CRIU"] == "4.2.1"
    assert all(facts[name] for name in ("processor", "cores", "memory", "kernel", "system", "Python"))
    assert facts["memory"] != "0.0 GiB"
