"""The report of a simulation: what it says follows from the results, it needs nothing from outside, and it is the same each time."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from loadgen import simulation_plots
from loadgen.simulation import Asked, Comparison, delay_s, group, write
from scaler.ladder import RUM_PER_MB_S
from scaler.simulate.model import FunctionTrace, Trace
from scaler.simulate.run import PolicyResult
from thaw.simulate import simulate

RUM_PER_GB_S = RUM_PER_MB_S * 1024
NAN = float("nan")
ASKED = Asked("thaw simulate --trace 'a <b>'", seed=7, delay_weight=2.0, jitter_s=0.05)
SECTIONS = (
    "Delay against memory",
    "The workload",
    "Policies: cost and delay",
    "Policies: starts and memory",
    "Functions: how often no running instance was found",
    "Functions: cost under thaw against others",
    "How to read it",
    "How it was measured",
    "Raw data",
)


def result(name, function_rum, *, rungs=True, wasted_gb_s=100.0, cold_rate=(0.5, 1.0, NAN), **more):
    summary = {
        "rungs": rungs,
        "bound": False,
        "rum": float(sum(function_rum)),
        "rum_second_half": sum(function_rum) / 2,
        "delay_p50_ms": 0.0,
        "delay_p90_ms": 1.7,
        "delay_p99_ms": 10.0,
        "delay_max_ms": 40.0,
        "starts": {"warm": 12345, "restore": 678} if rungs else {"warm": 12345, "cold": 678},
        "cold_rate_p50": 0.75,
        "cold_rate_p75": 0.875,
        "cold_rate_p90": 0.95,
        "wasted_gb_s": wasted_gb_s,
        "wasted_gb_s_by_rung": {"stored": 0.0, "cached": 0.0, "standby": wasted_gb_s / 4, "running": wasted_gb_s * 3 / 4},
    }
    return PolicyResult(name, rungs, False, np.array(function_rum), np.array(cold_rate), summary | more)


def bound(name, rum):
    return PolicyResult(name, True, True, np.array([rum, 0.0, 0.0]), np.full(3, NAN), {"rungs": True, "bound": True, "rum": rum})


@pytest.fixture
def results():
    return [
        result("thaw", [10.0, 10.0, 0.0]),
        result("keep-alive-10m", [400.0, 5.0, 0.0], rungs=False, wasted_gb_s=9000.0),
        result("hybrid-240", [300.0, 60.0, 0.0], rungs=False, wasted_gb_s=5000.0),
        result("thaw-without-rungs", [240.0, 0.0, 0.0], rungs=False, wasted_gb_s=7000.0),
        result("hybrid-240+rungs", [30.0, 0.0, 0.0], wasted_gb_s=700.0),
        result("run-20s", [50.0, 0.0, 0.0], wasted_gb_s=200.0),
        result("cached", [90.0, 0.0, 0.0], wasted_gb_s=0.0),
        bound("bound-per-gap", 21.0),
        bound("bound-pre-thaw", 16.0),
    ]


@pytest.fixture
def trace():
    def function(name, at_s, trigger):
        return FunctionTrace(name, np.array(at_s), np.full(len(at_s), 0.3), 128.0, trigger)

    functions = [function("f<1>", [0.5, 61.0, 62.0, 63.0], "timer"), function("f2", [1.0], "http <&>"), function("f3", [], "timer")]
    return Trace("day <one>", 120.0, functions)


def page_of(tmp_path, trace, results, asked=ASKED, name="out/report.html"):
    write(tmp_path / name, trace, results, asked)
    return (tmp_path / name).read_text()


def row_of(text, heading, first):
    """A row's cells, from the table in the section under the heading."""
    part = text[text.index(f"<h2>{heading}</h2>") :]
    row = re.search(rf"<tr[^>]*><td>{re.escape(first)}</td>(.*?)</tr>", part[: part.index("</section>")])
    assert row, f"{first} is not in {heading}"
    return re.findall(r"<td[^>]*>(.*?)</td>", row.group(1))


def test_the_headline_compares_thaw_with_the_best_of_each_kind(results):
    assert Comparison(results).headline() == {
        "rum": 20.0,
        "best_classic": "thaw-without-rungs",
        "best_classic_times": 12.0,
        "best_published": "hybrid-240",
        "best_published_times": 18.0,
        "best_static": "run-20s",
        "best_static_times": 2.5,
        "times_of_bound": 1.25,
    }


def test_the_tiles_say_the_headline(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results)
    tiles = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span><small>(.*?)</small>', text)
    assert [value for value, _, _ in tiles] == ["20.0", "12.0x", "2.50x", "1.25x"]
    assert "thaw-without-rungs: RUM 240, thaw&#x27;s own forecasts; than hybrid-240: RUM 360: 18.0x" in tiles[1][2]


def test_policies_are_of_four_kinds(results):
    kinds = {item.name: group(item) for item in results}
    assert kinds == {
        "thaw": "thaw",
        "keep-alive-10m": "classic",
        "hybrid-240": "classic",
        "thaw-without-rungs": "classic",
        "hybrid-240+rungs": "classic with rungs",
        "run-20s": "static ladder",
        "cached": "static ladder",
        "bound-per-gap": "bound",
        "bound-pre-thaw": "bound",
    }
    assert set(kinds.values()) - {"bound"} == set(simulation_plots.GROUPS)


def test_every_section_is_there_in_order(tmp_path, trace, results):
    assert tuple(re.findall(r"<h2>(.*?)</h2>", page_of(tmp_path, trace, results))) == SECTIONS


def test_the_tables_say_what_the_results_say_ordered_by_rum(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results)
    costs = row_of(text, "Policies: cost and delay", "hybrid-240")
    assert costs == ["classic", "360", "18.0x", "180", "0.0", "1.7", "10.0", "40.0", "50.0%"]  # dearer for one of two with requests
    assert row_of(text, "Policies: cost and delay", "bound-pre-thaw")[:3] == ["bound", "16.0", "0.80x"]
    assert row_of(text, "Policies: starts and memory", "run-20s") == ["12,345", "", "678", "", "", "200", "150", "50"]
    cold = row_of(text, "Functions: how often no running instance was found", "thaw")
    assert cold == ["75.0%", "87.5%", "95.0%", "50.0%"]
    part = text[text.index("Policies: cost and delay") : text.index("Policies: starts and memory")]
    names = re.findall(r"<tr[^>]*><td>(.*?)</td>", part)
    assert names == [item.name for item in sorted(results, key=lambda item: item.summary["rum"])]


def test_the_workload_is_described(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results)
    assert row_of(text, "The workload", "requests") == ["5"]
    assert row_of(text, "The workload", "requests per minute") == ["mean 2.5, peak 3 (1.2 times the mean)"]
    assert row_of(text, "The workload", "memory of a function") == ["median 128 MB, p90 128 MB"]
    assert row_of(text, "The workload", "seed") == ["7"]
    assert row_of(text, "The workload", "weight of delay") == ["2 RUM per second"]
    assert row_of(text, "The workload", "timer") == ["2", "4", "80.0%"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"jitter_s": 0.05}, "its own and stays, ± 0.05 s"),
        ({"jitter_s": None}, "those of timers too, come uniformly within the minute"),
        ({"jitter_s": 0.05, "own_times": True}, "as the trace has them, event by event"),
    ],
)
def test_the_arrival_process_is_the_one_that_was_asked_for(tmp_path, trace, results, asked, said):
    assert said in page_of(tmp_path, trace, results, Asked("thaw simulate", 1, 1.0, **asked))


def test_text_from_outside_is_escaped(tmp_path, trace, results):
    text = page_of(tmp_path, trace, [*results, result("run <&>", [60.0, 0.0, 0.0])], name="out/a&b.html")
    assert "day &lt;one&gt;" in text
    assert "http &lt;&amp;&gt;" in text
    assert "run &lt;&amp;&gt;" in text
    assert "--trace &#x27;a &lt;b&gt;&#x27;" in text
    assert '<a href="a&amp;b.json">' in text
    assert not re.search(r"<one>|<b>'|<&>", text)


def test_it_fetches_nothing_and_its_figures_do_not_share_names(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 3
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import", text)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for figure in figures:
        own = set(re.findall(r'\bid="([^"]+)"', figure))
        assert all(target in own for target in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', figure))


def test_the_figures_name_what_they_draw(tmp_path, trace, results):
    pareto, cold, ratios = re.findall(r"<svg.*?</svg>", page_of(tmp_path, trace, results), flags=re.DOTALL)
    for said in ("thaw", "cached", "classic (3)", "classic with rungs (1)", "static ladder (2)", "bound: RUM 16"):
        assert f">{said}</text>" in pareto
    for name in ("thaw", "keep-alive-10m", "hybrid-240", "thaw-without-rungs", "run-20s"):
        assert f">{name}: median 75%</text>" in cold
    assert "thaw / keep-alive-10m: median 1, above 1 for 50.0%" in ratios  # 10 / 400 and 10 / 5
    assert "thaw / run-20s: median 0.2, above 1 for 0.0%" in ratios


def test_delay_is_what_of_rum_is_not_memory():
    assert delay_s(result("thaw", [10.0 + 50 * RUM_PER_GB_S], wasted_gb_s=50.0), 4.0) == pytest.approx(2.5)


def test_free_delay_leaves_the_page_without_its_plot(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results, Asked("thaw simulate", 1, 0.0, None))
    assert "Delay has no price at this weight" in text
    assert text.count("<svg") == 2


def test_optional_figures_are_shown_when_they_are_there(tmp_path, trace, results):
    assert "forecasts and decisions" not in page_of(tmp_path, trace, results)
    results[0] = result("thaw", [10.0, 10.0, 0.0], calibration={"p50": 0.493}, handle_us_mean=12.34)
    text = page_of(tmp_path, trace, results)
    assert row_of(text, "Policies: forecasts and decisions", "thaw") == ["0.493", "12.34"]


def test_what_was_not_run_leaves_gaps(tmp_path, trace, results):
    text = page_of(tmp_path, trace, [item for item in results if item.name == "keep-alive-10m"])
    assert re.findall(r'<div class="tile"><b>(.*?)</b>', text) == ["–", "–", "–", "–"]
    assert "Neither keep-alive-10m nor a static ladder was run beside thaw." in text


def test_the_same_results_give_the_same_bytes(tmp_path, trace, results):
    first = page_of(tmp_path, trace, results, name="one/report.html")
    assert page_of(tmp_path, trace, results, name="two/report.html") == first
    assert (tmp_path / "one/report.json").read_bytes() == (tmp_path / "two/report.json").read_bytes()


def test_the_raw_data_hold_the_figures(tmp_path, trace, results):
    text = page_of(tmp_path, trace, results)
    links = re.findall(r'<a href="([^"]+)"', text)
    assert links == ["report.json"]
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["headline"]["best_static_times"] == 2.5
    assert data["policies"]["thaw"]["function_rum"] == [10.0, 10.0, 0.0]
    assert data["policies"]["thaw"]["function_cold_rate"] == [0.5, 1.0, None]
    assert data["policies"]["thaw"]["worse_share"] == 0.5
    assert [function["requests"] for function in data["functions"]] == [4, 1, 0]


def test_the_product_is_labelled_and_no_label_covers_another(monkeypatch):
    drawn = []
    monkeypatch.setattr(simulation_plots, "svg", lambda figure, name: drawn.append(figure) or "<svg>")
    crowd = [simulation_plots.Point(f"policy-{n}", "static ladder", 1000.0 * 1.02**n, 10.0 * 1.02**n) for n in range(12)]
    points = [simulation_plots.Point("thaw", "thaw", 1010.0, 10.1), *crowd]
    simulation_plots.pareto(points, rum_per_gb_s=RUM_PER_GB_S, delay_weight=1.0, labelled=[point.name for point in points])
    (axes,) = drawn[0].axes
    names = [text for text in axes.texts if text.get_text() in {point.name for point in points}]
    boxes = [super(type(text), text).get_window_extent() for text in names]
    assert names[0].get_text() == "thaw"
    assert len(names) > 1
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


@pytest.fixture
def npz(tmp_path):
    counts = np.zeros((2, 30), int)
    counts[0, ::5], counts[1, [3, 7, 20]] = 1, 2
    np.savez(tmp_path / "small trace.npz", counts=counts, memory_mb=np.array([100.0, 200.0]))
    return tmp_path / "small trace.npz"


def test_the_command_writes_the_report_and_says_how_to_repeat_it(tmp_path, npz):
    report = tmp_path / "r.html"
    words = ["--trace", str(npz), "--policy", "thaw", "--policy", "run-20s", "--timer-jitter-s", "uniform", "--json"]
    ended = CliRunner().invoke(simulate, [*words, "--report", str(report)])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["policies"].keys() == {"thaw", "run-20s"}
    data = json.loads(report.with_suffix(".json").read_text())
    assert data["policies"].keys() == {"thaw", "run-20s", "keep-alive-10m"}
    assert data["command"].split(" ", 1)[1] == (
        f"--trace '{npz}' --policy thaw --policy run-20s --timer-jitter-s uniform --json --report {report}"
    )


def test_minute_mode_has_no_report(tmp_path, npz):
    ended = CliRunner().invoke(
        simulate, ["--trace", str(npz), "--resolution", "minute", "--concurrency", "off", "--report", str(tmp_path / "r.html")]
    )
    assert ended.exit_code == 2
    assert "--report does not go with --resolution minute" in ended.output


def test_the_page_cannot_have_the_name_of_its_figures(tmp_path, npz):
    ended = CliRunner().invoke(simulate, ["--trace", str(npz), "--report", str(tmp_path / "r.json")])
    assert ended.exit_code == 2
    assert "call it .html" in ended.output
