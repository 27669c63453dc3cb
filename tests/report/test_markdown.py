"""Text as Markdown."""

from gptq_plugin.report.markdown import code, escaped, snippet, table


def test_a_text_is_shown_as_it_is_on_one_line() -> None:
    assert escaped("a_b *c*\n| <d> & `e`") == r"a_b \*c\* \| &lt;d&gt; &amp; \`e\`"
    assert escaped("_x_ # [y]") == r"\_x\_ \# \[y\]"
    assert escaped("read from /home/me/data.json now") == "read from data.json now"


def test_a_value_is_code_that_ends_neither_its_cell_nor_itself() -> None:
    assert code(True) == "`true`" and code([1, 2]) == "`[1, 2]`"
    assert code("a|b") == "`a\\|b`"
    assert code("a`b``c") == "``` a`b``c ```"


def test_a_table_has_a_rule_below_its_head_and_a_snippet_its_title() -> None:
    assert table(("a", "b"), [("1", "2")]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert snippet("vLLM", "vllm serve .", "bash") == "### vLLM\n\n```bash\nvllm serve .\n```"
