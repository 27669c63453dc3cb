"""The result of a check."""

from gptq_plugin.check.findings import Lint, error, warning


def test_errors_are_the_messages_that_make_a_checkpoint_wrong() -> None:
    found = Lint()
    found.add([warning("odd"), error("wrong")])
    found.add(error(text) for text in ("worse",))
    assert found.errors == ["wrong", "worse"]
    assert [finding.message for finding in found.findings] == ["odd", "wrong", "worse"]
