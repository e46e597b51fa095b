"""robots.txt, as it addresses our product token."""

from __future__ import annotations

from protego import Protego


class Rules:
    """What a file says of the URLs of its host. This one says nothing."""

    delay_s = 0.0
    """Seconds that should lie between two requests."""
    detail = ""
    """What is said of a page that is forbidden."""

    def forbid(self, url: str) -> bool:
        """Whether a page must not be asked for."""
        return False


SILENT = Rules()


class Robots(Rules):
    """A robots.txt, as it addresses our product token."""

    def __init__(self, text: str, agent: str) -> None:
        self._rules = Protego.parse(text)
        self._agent = agent
        self.delay_s = self._rules.crawl_delay(agent) or 0.0
        self.detail = "disallowed by robots.txt"

    def forbid(self, url: str) -> bool:
        """Whether it disallows us the page."""
        return not self._rules.can_fetch(url, self._agent)
