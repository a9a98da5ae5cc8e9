"""What a reader does with a report in a browser, and what it shows then."""

from __future__ import annotations

import time

import numpy as np

# What would do something if a page read it as HTML, as a template or as a sign of direction.
HACKS = [
    "<b>bold</b></script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "\"'`&amp;<b>",
    "\u202eevil",
    "${1}",
    "{{code}}",
]


def token(page, position):
    return page.locator(f'.token[data-position="{position}"]')


def shown_numbers(page):
    """What the panel says of the chosen token: name -> (number, how far it may be off)."""
    entries = page.locator("#token dd").evaluate_all(
        "all => all.map(each => [each.dataset.statistic, Number(each.dataset.value), Number(each.dataset.error)])"
    )
    return {name: (value, error) for name, value, error in entries}


def shown_links(page, direction):
    """The list of a direction: [(position, weight)], weights as stored in the page."""
    return page.locator(f".links.{direction} .link").evaluate_all(
        "all => all.map(each => [Number(each.dataset.start), Number(each.dataset.weight)])"
    )


def drawn(page, name, traces="all => all[0].data.map(({x, y, z}) => ({x, y, z}))"):
    """The data of a chart, once it is drawn."""
    page.locator(f"#{name}").scroll_into_view_if_needed()
    page.locator(f"#{name}[data-drawn]").wait_for()
    return page.locator(f"#{name} .plot").evaluate_all(traces)


def until(condition):
    """Waits for what comes soon."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def twice(tolerances):
    return {name: 2 * value for name, value in tolerances.items()}


def numbers(rows):
    return np.array([[np.nan if cell is None else cell for cell in row] for row in rows], dtype=float)
