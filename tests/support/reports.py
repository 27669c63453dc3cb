"""Reports made by hand, and a parser of the pages made of them."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from gptq_plugin import QuantizeConfig
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import QuantizeReport

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Page(HTMLParser):
    """The page's tags, balanced or it raises, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def within(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def marks(self, kind: str) -> list[dict[str, Any]]:
        """The circles of a kind, without the legend's."""
        return [attributes for tag, attributes in self.tags if tag == "circle" and attributes["class"] == kind][1:]


def module(name: str, loss: float = 0.02, rtn_loss: float = 0.05, **other: Any) -> ModuleReport:
    return ModuleReport(name, "gptq", 3, 16, (20, 48), loss, rtn_loss, 640, 0.01, 0.25, **other)


def report(*modules: ModuleReport, **other: Any) -> QuantizeReport:
    return QuantizeReport(QuantizeConfig(bits=3, group_size=16), list(modules), 40, 640, **other)
