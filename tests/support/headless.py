"""A page in a headless Chromium."""

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from processes import PATIENCE_S


def opened(browser: str, page: str, screenshot: Path) -> tuple[str, str]:
    """The document after its scripts ran, and what the browser's console said. The window holds the whole page."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,7000"]
    command += [
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        f"--user-data-dir={screenshot.parent / 'user'}",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # offline
    result = subprocess.run(
        [*command, f"--screenshot={screenshot}", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return result.stdout, "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


class Drawn(HTMLParser):
    """Of every picture, how many shapes it has; and the page's title and further elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shapes: dict[str, int] = {}
        self.title, self.tags, self._tag, self._figure = "", set[str](), "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        has = dict(attrs)
        self._tag = tag
        self.tags.add(tag)
        if "data-figure" in has:
            self._figure = has["data-figure"]
            self.shapes[self._figure] = 0
        elif tag == "section":
            self._figure = ""
        elif tag == "path" and self._figure and has.get("d"):
            self.shapes[self._figure] += bool(
                re.search("js-line|point|fill", has.get("class") or "") or has.get("style")
            )

    def handle_data(self, data):
        if self._tag == "title" and not self.title:
            self.title = data
