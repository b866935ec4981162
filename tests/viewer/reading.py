"""Reading the viewer's pages."""

import html
import re


def text_of(page: str) -> str:
    """Returns the words of a page, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
