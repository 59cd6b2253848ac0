"""What tests read off the page of a report."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects what the page would load and checks that its tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.ids, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href", "srcset", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Widths(HTMLParser):
    """Collects how many columns the rows of each table have, by the table's id or number."""

    def __init__(self, text):
        super().__init__()
        self.of, self.table = {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "table":
            self.table = values.get("id", str(len(self.of)))
        elif tag == "tr":
            self.of.setdefault(self.table, []).append(0)
        elif tag in ("td", "th"):
            self.of[self.table][-1] += int(values.get("colspan", 1))
