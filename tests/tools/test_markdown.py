"""Foreign text in Markdown is what a reader sees, and no Markdown or HTML: held against a parser of CommonMark."""

import pytest
import yaml
from dpop_trainer.report.markdown import code, plain, table
from dpop_trainer.tools.delivery.card import base_license, model_card

FOREIGN = [
    "a`<script>alert(1)</script>`b",
    "`",
    "``",
    "a``b`c",
    "`a",
    "a`",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "![a](http://x/y.png)",
    "**a** | b\n# c\n\n---",
    "a\\",
    "\\`<b>",
    "&lt;b&gt;",
]


@pytest.fixture(scope="module")
def rendered():
    markdown_it = pytest.importorskip("markdown_it", reason="a parser of CommonMark, which the page on the site has")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render


@pytest.mark.parametrize("text", FOREIGN)
def test_a_parser_finds_the_text_and_nothing_else(rendered, text):
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = " ".join(escaped.split())
    assert rendered(f"x {plain(text)}") == f"<p>x {words}</p>\n"
    assert rendered(f"x {code(text)}") == f"<p>x <code>{words}</code></p>\n"
    assert f"<td>{words}</td>" in rendered(table(("x",), [(text,)]))


def test_a_card_shows_names_as_they_are(tmp_path, rendered):
    name = "<b>`x`<script>alert(1)"
    config = {"dataset_name": f"{name}.jsonl", "loss_type": name, "lora_target_modules": [name]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    card = model_card(tmp_path, name=name, base=name, license_id=name, merge_note="")
    html = rendered(card.split("---\n", 2)[2])
    assert html.count("alert(1)") >= 5
    assert not any(tag in html for tag in ("<b>", "<script>", "<img"))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == name
    assert "base_model" not in front


@pytest.mark.parametrize(
    "content",
    [b"---\nlicense: [mit\n---\n", b"---\nlicense: \xff\n---\n", b"---\n" + b"[" * 1500, b"---\n- mit\n---\n"],
)
def test_a_base_whose_card_cannot_be_read_has_no_known_licence(tmp_path, content, caplog):
    (tmp_path / "README.md").write_bytes(content)
    assert base_license(str(tmp_path)) is None
    assert ("README.md: its licence cannot be read" in caplog.text) == (not content.startswith(b"---\n- mit"))
