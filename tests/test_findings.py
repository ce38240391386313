"""A report reads well as text and as HTML, and nothing in it is taken for markup."""

from __future__ import annotations

from workbench.probes.findings import CheckReport, failed, not_applicable, passed

REPORT = CheckReport(
    "<Model>",
    (
        passed("shift", "fine"),
        passed("cache", "for one row"),
        failed("cache", "row <1> moved by 0.3", "joined on the batch axis"),
        not_applicable("softcap", "the config names none"),
    ),
    0.5,
)


def test_one_failure_decides():
    assert not REPORT.ok
    assert [finding.detail for finding in REPORT.failures] == ["row <1> moved by 0.3"]
    assert REPORT.failed_checks == {"cache"}
    assert CheckReport("model", REPORT.findings[:2], 0.0).ok


def test_a_heading_has_the_status_of_its_worst_finding():
    assert REPORT.status("cache") == "FAILED"
    assert REPORT.status("shift") == "ok"
    assert REPORT.status("softcap") == "not applicable"
    assert REPORT.status("unheard of") is None


def test_text_has_every_finding_with_its_cause():
    text = str(REPORT)
    assert text.startswith("<Model>: 2 ok, 1 FAILED, 1 not applicable")
    assert "✗ cache" in text
    assert "→ joined on the batch axis" in text
    assert "– softcap  not applicable: the config names none" in text
    assert max(map(len, text.splitlines())) <= 100


def test_html_is_escaped():
    html = REPORT._repr_html_()
    assert "&lt;Model&gt;" in html
    assert "row &lt;1&gt; moved" in html
    assert "<Model>" not in html
    assert html.count("<tr>") == 1 + len(REPORT.findings)


def test_table_has_a_row_a_finding():
    table = REPORT.table()
    assert table["status"].tolist() == ["ok", "ok", "FAILED", "not applicable"]
    assert list(table) == ["check", "status", "detail", "cause"]
